"""Object detectors and instance segmenters of transformers: images in, plain lists of named boxes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewards.base import RewardError
from rewards.networks.hub import from_pretrained, network, typed_line
from rewards.rows import eight_bit

SAME = (
    ("airplane", "aeroplane"),
    ("motorcycle", "motorbike"),
    ("couch", "sofa"),
    ("potted plant", "pottedplant"),
    ("dining table", "diningtable"),
    ("tv", "tvmonitor"),
    ("mouse", "computer mouse"),
    ("remote", "tv remote"),
    ("keyboard", "computer keyboard"),
    ("hair drier", "hair dryer"),
)
"""Classes of COCO that detectors and prompts spell differently."""


class Box(NamedTuple):
    """A rectangle in pixels, from the upper left corner."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Found:
    """One object: confidence, box, and its mask ``[H, W]`` bool if the detector gives one."""

    score: float
    box: Box
    mask: Tensor | None = None


Objects = dict[str, list[Found]]
"""Class -> objects, the surest first."""


@dataclass(frozen=True)
class Detector:
    """A network, its image processor and the names of its classes.

    Args:
        segments: whether it finds masks, whose outlines are the boxes, or boxes.
        names: number -> class.
    """

    model: Any
    processor: Any
    segments: bool
    names: dict[int, str]

    @classmethod
    def load(cls, path: str, device: torch.device | str, dtype: str = "float32") -> Detector:
        """Read it, and have it look at a grey image.

        Args:
            path: folder or hub id of a model for object detection (DETR, RT-DETR, YOLOS ...) or for instance
                segmentation (Mask2Former, MaskFormer).

        Raises:
            RewardError: not there, not such a model, weights missing, classes without names, or it does not run.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
        from transformers import AutoModelForUniversalSegmentation as AutoSegmenter

        config = from_pretrained(AutoConfig, path)
        segments = config.model_type in ("mask2former", "maskformer")
        if not segments and type(config) not in AutoModelForObjectDetection._model_mapping:
            kinds = "object detection (RT-DETR, DETR ...) or instance segmentation (Mask2Former)"
            raise RewardError(f"{path} holds a {config.model_type} model, which transformers does not list for {kinds}")
        auto = AutoSegmenter if segments else AutoModelForObjectDetection
        # weights of the loss, which no score passes through
        model = network(auto, path, idle=("criterion.",), dtype=getattr(torch, dtype))
        names = {int(number): name for number, name in model.config.id2label.items()}
        if all(name.startswith("LABEL_") for name in names.values()):
            raise RewardError(f"{path} does not name its classes (id2label in its config.json)")
        model.requires_grad_(False).eval().to(device)
        found = cls(model, from_pretrained(AutoImageProcessor, path), segments, names)
        try:
            found(torch.full((1, 3, 64, 64), 0.5), 0.5)
        except Exception as error:  # whatever a processor and a network that do not fit each other raise
            raise RewardError(f"the detector {path} does not run: {typed_line(error)}") from error
        return found

    @torch.no_grad()
    def __call__(self, images: Tensor, threshold: float) -> list[Objects]:
        """Objects of ``[N, 3, H, W]`` in [0, 1] that are surer than ``threshold``, boxes within the image."""
        size = tuple(images.shape[-2:])
        inputs = self.processor(list(eight_bit(images)), return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs, sizes = self.model(**inputs), [size] * len(images)
        if self.segments:
            said = self.processor.post_process_instance_segmentation(
                outputs, threshold=threshold, target_sizes=sizes, return_binary_maps=True
            )
            return [_by_class(self._from_masks(one), threshold) for one in said]
        said = self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        return [_by_class(self._from_boxes(one, size), threshold) for one in said]

    def known(self, name: str) -> str | None:
        """The detector's own name of a class, or None."""
        names = set(self.names.values())
        same = next((group for group in SAME if name in group), ())
        return next((candidate for candidate in (name, *same) if candidate in names), None)

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Classes that the detector does not have."""
        return sorted({name for name in names if self.known(name) is None})

    def _from_boxes(self, said: Any, size: Sequence[int]) -> list[tuple[str, Found]]:
        limits = torch.tensor([size[1], size[0], size[1], size[0]])
        boxes = torch.minimum(said["boxes"].float().cpu().clamp(min=0), limits)
        rows = zip(said["scores"].tolist(), said["labels"].tolist(), boxes.tolist(), strict=True)
        return [(self.names[label], Found(score, Box(*box))) for score, label, box in rows]

    def _from_masks(self, said: Any) -> list[tuple[str, Found]]:
        if not said["segments_info"]:  # then what should be masks is something else
            return []
        masks = said["segmentation"].cpu() > 0.5
        pairs = zip(said["segments_info"], masks, strict=True)
        return [(self.names[info["label_id"]], Found(info["score"], _outline(mask), mask)) for info, mask in pairs]


def _outline(mask: Tensor) -> Box:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return Box(float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def _by_class(found: Iterable[tuple[str, Found]], threshold: float) -> Objects:
    objects: Objects = {}
    for name, one in sorted(found, key=lambda pair: -pair[1].score):
        if one.score > threshold:
            objects.setdefault(name, []).append(one)
    return objects
