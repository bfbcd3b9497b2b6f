"""Match between a requested layout and detected objects: intersection over union of their boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, Scores
from rewards.digest import digest
from rewards.model_settings import LoadedRewardSettings
from rewards.rows import by_row, chosen_score, column

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks.detector import Detector
else:
    Detector = lazy("rewards.networks.detector:Detector")

Corners = Sequence[float]
WHAT = "[{class: dog, box: [left, top, right, bottom] in 0 .. 1}, ...]"


class Layout(LoadedRewardSettings):
    """Mean IoU between the boxes a prompt requests and the boxes a detector finds, each found box used once.

    The boxes are the prompt's column ``boxes``: ``[{"class": "dog", "box": [left, top, right, bottom]}, ...]`` in
    shares of width and height. A box whose object is missing counts 0; additional objects do not count.
    """

    kind: Literal["layout"] = Field("layout", description="IoU of requested and detected boxes")
    model: str = Field(
        "facebook/mask2former-swin-small-coco-instance",
        description="folder or hub id of a detector (RT-DETR, DETR ...) or instance segmenter (Mask2Former)",
    )
    threshold: float = Field(0.3, ge=0, lt=1, description="minimum detection score (exclusive)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="compute dtype of the detector")
    frames: int | None = Field(None, ge=1, description="frames scored per video, evenly spaced; null = all")

    def load(self, device: torch.device | str) -> Reward:
        """Load the detector."""
        detector = Detector.load(self.model, device, self.dtype)

        def function(media: Tensor, prompts: list[str], group: Tensor | None, metadata: list[Any]) -> Scores:
            height, width = media.shape[-2:]

            def judge(frames: Tensor, row: Mapping[str, Any]) -> dict[str, float]:
                wanted = wanted_boxes(row)
                if unknown := detector.unknown(wanted):
                    raise ValueError(f"the detector has no class {', '.join(map(repr, unknown))}")
                total = 0.0
                for seen in (detector(image[None], self.threshold)[0] for image in frames):
                    found = {name: [one.box for one in seen.get(detector.known(name) or "", [])] for name in wanted}
                    total += mean_iou(wanted, {name: _shares(boxes, width, height) for name, boxes in found.items()})
                return {"layout": total / len(frames)}

            return chosen_score(by_row(media, metadata, judge, self.frames), "layout")

        return Reward(
            "layout",
            function,
            range=(0.0, 1.0),
            wants=("metadata",),
            fingerprint=lambda: digest(detector.model.state_dict()),
        )


def mean_iou(wanted: Mapping[str, Sequence[Corners]], found: Mapping[str, Sequence[Corners]]) -> float:
    """Mean over the wanted boxes of their IoU in the best one-to-one matching within each class.

    >>> mean_iou({"dog": [(0, 0, 2, 2), (5, 5, 6, 6)]}, {"dog": [(0, 0, 2, 1)], "cat": [(5, 5, 6, 6)]})
    0.25
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    total = 0.0
    for name, boxes in wanted.items():
        table = np.array([[iou(a, b) for b in found.get(name, [])] for a in boxes]).reshape(len(boxes), -1)
        total += float(table[linear_sum_assignment(table, maximize=True)].sum())
    return total / sum(map(len, wanted.values()))


def iou(a: Corners, b: Corners) -> float:
    """Intersection over union of two boxes (left, top, right, bottom) with an area.

    >>> iou((0, 0, 2, 2), (1, 1, 3, 3)) == 1 / 7
    True
    """
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    common = sides[0] * sides[1]
    return common / (sum(areas) - common)


def wanted_boxes(row: Mapping[str, Any]) -> dict[str, list[Corners]]:
    """Class -> boxes in 0 .. 1 of a prompt's column ``boxes``.

    Raises:
        ValueError: no such column, or an entry that is not a box; the message names it.
    """
    boxes: dict[str, list[Corners]] = {}
    for index, entry in enumerate(column(row, "boxes", list, WHAT)):
        fields = entry if isinstance(entry, Mapping) else {}
        name, box = fields.get("class"), fields.get("box") or []
        good = isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
        if not isinstance(name, str) or not good or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"boxes[{index}] should be one of {WHAT}, is {entry!r}")
        boxes.setdefault(name, []).append(tuple(box))
    if not boxes:
        raise ValueError("boxes is empty: there is nothing to check")
    return boxes


def _shares(boxes: Sequence[Corners], width: int, height: int) -> list[Corners]:
    return [(left / width, top / height, right / width, bottom / height) for left, top, right, bottom in boxes]
