"""GenEval: are the requested objects present, in the right number, colour and place? By a detector and CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alignflow.lazy import lazy
from alignflow.paths import expanded
from rewards.base import Reward, RewardError, Scores
from rewards.digest import digest
from rewards.geneval_rules import COLOURS, MOST, THRESHOLD, Task, judge, read_task
from rewards.model_settings import LoadedRewardSettings
from rewards.rows import by_row, chosen_score, column

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from alignflow.files import images
    from rewards.networks.clip import Clip
    from rewards.networks.detector import Detector, Found
else:
    images = lazy("alignflow.files.images")
    Clip = lazy("rewards.networks.clip:Clip")
    Detector = lazy("rewards.networks.detector:Detector")

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99 / 255


class GenEval(LoadedRewardSettings):
    """GenEval's verdict on the objects in the image: counts, colours, places; dense, strict or as published.

    What is asked for are the prompt's columns ``include``, ``exclude`` and ``tag``, as in GenEval's
    ``evaluation_metadata.jsonl``. A prompt without them, or with a class that the detector does not have, has no score.
    """

    kind: Literal["geneval"] = Field("geneval", description="presence of the requested objects")
    score: Literal["dense", "strict", "published"] = Field(
        "dense",
        description="dense = mean over requirements (Flow-GRPO) | strict = 1 if all are met with exact counts "
        "(Flow-GRPO) | published = GenEval's 0 or 1; all three are logged",
    )
    model: str = Field(
        "facebook/mask2former-swin-small-coco-instance",
        description="folder or hub id of a detector (RT-DETR, DETR ...) or instance segmenter (Mask2Former)",
    )
    clip: str = Field("openai/clip-vit-large-patch14", description="CLIPModel folder or hub id, for naming colours")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="compute dtype of both networks")
    frames: int | None = Field(None, ge=1, description="frames scored per video, evenly spaced; null = all")
    probe: tuple[str, str] | None = Field(
        None,
        description="[image file, class in it]: self-test at the start that stops the run if the detector finds "
        "nothing; null = none",
    )

    def load(self, device: torch.device | str) -> Reward:
        """Load detector and CLIP, and try the detector on the probe."""
        detector = Detector.load(self.model, device, self.dtype)
        clip = Clip.load(self.clip, None, self.dtype, device, preprocess="cropped", repair=True)
        if self.probe:
            _try_on(detector, *self.probe)

        def function(media: Tensor, prompts: list[str], group: Tensor | None, metadata: list[Any]) -> Scores:
            def verdicts(frames: Tensor, row: Mapping[str, Any]) -> dict[str, float]:
                return _mean_verdict(frames, task_of(row, detector), detector, clip)

            return chosen_score(by_row(media, metadata, verdicts, self.frames), self.score)

        return Reward(
            "geneval",
            function,
            range=(1.0 - (MOST - 1), 1.0) if self.score == "dense" else (0.0, 1.0),
            wants=("metadata",),
            fingerprint=lambda: digest([detector.model.state_dict(), clip.model.state_dict()]),
        )


def task_of(row: Mapping[str, Any], detector: Detector) -> Task:
    """Request of a prompt's row, in the detector's names.

    Raises:
        ValueError: no such columns, or classes that the detector does not have.
    """
    include = column(row, "include", list, "GenEval's list of class, count, color, position")
    exclude = column(row, "exclude", list, "GenEval's list of class and count", default=[])
    task = read_task(include, exclude, str(row.get("tag") or ""))
    clauses = [*task.include, *task.exclude]
    if unknown := detector.unknown(clause.name for clause in clauses):
        some = ", ".join(sorted(set(detector.names.values()))[:8])
        raise ValueError(f"the detector has no class {', '.join(map(repr, unknown))}; it has {some}, ...")
    return task


def colour_of(clip: Clip, image: Tensor, name: str, found: Sequence[Found]) -> list[str]:
    """CLIP's colour of each object: its crop, what is not the object grey (#999), against three sentences a colour.

    Args:
        image: ``[3, H, W]`` in [0, 1].
    """
    import torch
    from torch.nn import functional as F

    texts = [template.format(color=colour, name=name) for colour in COLOURS for template in TEMPLATES]
    sentences = clip.text_features(texts, len(texts)).unflatten(0, (len(COLOURS), len(TEMPLATES)))
    crops = [clip.image_features(_crop(image, one)[None]) for one in found]
    likes = torch.cat(crops) @ F.normalize(sentences.mean(1), dim=-1).T
    return [COLOURS[index] for index in likes.argmax(1).tolist()]


def _mean_verdict(frames: Tensor, task: Task, detector: Detector, clip: Clip) -> dict[str, float]:
    total = {"published": 0.0, "strict": 0.0, "dense": 0.0}
    names = {clause.name: detector.known(clause.name) or "" for clause in [*task.include, *task.exclude]}
    for image in frames:
        seen = detector(image[None], task.threshold)[0]
        objects = {name: seen.get(own, []) for name, own in names.items()}
        verdict = judge(objects, task, partial(colour_of, clip, image))
        total = {key: total[key] + value / len(frames) for key, value in verdict._asdict().items()}
    return total


def _crop(image: Tensor, one: Found) -> Tensor:
    """The object's rectangle, at least a pixel wide, on whole pixels as Pillow rounds."""
    import torch

    mask = one.mask
    shown = image if mask is None else torch.where(mask.to(image.device), image, torch.full_like(image, GREY))
    left, top, right, bottom = map(round, one.box)
    return shown[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def _try_on(detector: Detector, file: str, name: str) -> None:
    """Raise RewardError unless the detector finds ``name`` in the image."""
    import torch

    if detector.known(name) is None:
        raise RewardError(f"probe: the detector has no class {name!r}")
    try:
        pixels = images.read_image(expanded(file, RewardError)).copy()
    except (OSError, images.ImageError) as error:
        raise RewardError(f"probe: {file} cannot be read as an image: {error}") from error
    seen = detector(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, THRESHOLD)[0]
    if detector.known(name) not in seen:
        found = ", ".join(seen) or "nothing"
        raise RewardError(f"probe: the detector finds no {name!r} in {file}, but {found}; are its weights right?")
