"""The embedded world's verifiers as rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError, RewardSettings, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.worlds import shapes, shapes_edit, shapes_video
else:
    shapes, shapes_edit = lazy("rewards.worlds.shapes"), lazy("rewards.worlds.shapes_edit")
    shapes_video = lazy("rewards.worlds.shapes_video")


Score = Annotated[
    Literal["dense", "strict"], Field(description="dense = share of correct properties | strict = all or nothing")
]


def _reward(
    kind: str, which: str, score: Callable[..., dict[str, Any]], wants: tuple[str, ...] = (), videos: bool = False
) -> Reward:
    """A reward that gives `score` the media, what it needs and the prompts, on the CPU; all results are its parts."""
    import torch

    def function(media: Tensor, prompts: list[str], group: Tensor | None, **given: Tensor) -> Scores:
        if media.ndim != 4 + videos:
            said = ("videos [N, F, 3, H, W]", "single images") if videos else ("single images [N, 3, H, W]", "video")
            raise RewardError(f"reward {kind!r} reads {said[0]}, got {said[1]}")
        images = [x.detach().float().cpu() for x in (media, *(given[name] for name in wants))]
        found = score(*images, prompts)
        reasons = found.pop("reasons")
        parts = {name: torch.as_tensor(values) for name, values in found.items()}
        return Scores(parts[which], reasons, parts)

    return Reward(kind, function, range=(0.0, 1.0), wants=wants)


class ShapesVerifier(RewardSettings):
    """Parses an image of the embedded world into a scene and compares it with its caption; no model."""

    gives_regions: ClassVar[bool] = True
    kind: Literal["shapes"] = Field("shapes", description="the embedded world's verifier")
    score: Score = "dense"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Needs no device: the verifier is numpy."""
        import torch

        def regions(media: Tensor, prompts: list[str]) -> Tensor:
            return torch.from_numpy(shapes.regions(media.detach().float().cpu(), prompts))

        return replace(_reward("shapes", self.score, shapes.score_batch), regions=regions)


class ShapesEditVerifier(RewardSettings):
    """Parses an edited image of the embedded world and its source, and checks the edit and the unchanged rest"""

    kind: Literal["shapes_edit"] = Field("shapes_edit", description="the embedded world's verifier of edits")
    score: Score = "dense"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Needs no device: the verifier is numpy."""
        return _reward("shapes_edit", self.score, shapes_edit.score_edits, ("image",))


class ShapesFillVerifier(RewardSettings):
    """Parses a filled image of the embedded world, and checks the object in the hole and the unchanged rest"""

    kind: Literal["shapes_fill"] = Field("shapes_fill", description="the embedded world's verifier of fills")
    score: Score = "dense"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Needs no device: the verifier is numpy."""
        return _reward("shapes_fill", self.score, shapes_edit.score_fills, ("image", "mask"))


class ShapesVideoVerifier(RewardSettings):
    """Tracks the objects in a video of the embedded world, and compares kind and motion with the caption; no model."""

    kind: Literal["shapes_video"] = Field("shapes_video", description="the embedded world's verifier of videos")
    score: Score = "dense"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Needs no device: the verifier is numpy."""
        return _reward("shapes_video", self.score, shapes_video.score_batch, videos=True)
