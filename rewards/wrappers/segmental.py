"""An image reward on a few frames of a video, one per segment, weighted towards the middle (InstructVideo)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rewards import AnyReward
from rewards.base import Reward, RewardError, Scores, WrapperSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Segmental(WrapperSettings):
    """Another reward on one frame per segment of a video; frames far from the middle count less (InstructVideo).

    Gradients flow to the chosen frames only. Rewards that are negative should not be attenuated: less weight makes
    them better.
    """

    passes_gradient: ClassVar[bool] = True
    kind: Literal["segmental"] = Field("segmental", description="another reward on a few weighted frames of a video")
    reward: AnyReward = Field(description="reward of an image: {kind: ...}")
    segments: int = Field(4, ge=1, description="number of equal segments, one frame of each of which is scored")
    attenuation: float = Field(
        1.0, ge=0, description="lambda in the frame weight exp(-lambda |frame - middle|); 0 = equal weights"
    )
    pick: Literal["first", "middle", "random"] = Field(
        "middle",
        description="frame of a segment; random = a new one at every call (InstructVideo), from torch's generator",
    )
    normalise: bool = Field(
        False,
        description="divide by the sum of the weights: a mean on the reward's own scale; false = divide by the "
        "number of segments",
    )

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Build it.

        Raises:
            RewardError: the reward compares samples, which frames of one video are not.
        """
        import torch

        inner = self.reward.build(device)
        if inner.scope != "sample":
            raise RewardError(f"reward 'segmental': {inner.name!r} compares samples; frames must be scored separately")

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Scores:
            videos = media if media.ndim == 5 else media[:, None]
            chosen = frames_of_segments(videos.shape[1], self.segments, self.pick)
            weights = torch.tensor(attenuated(chosen, videos.shape[1], self.attenuation))
            each = [inner(videos[:, index], prompts, None, inputs) for index in chosen]
            values = torch.stack([scores.values for scores in each], 1)
            total = (values * weights.to(values)).sum(1)
            reasons = {index: why for scores in each for index, why in scores.reasons.items()}
            return Scores(total / (weights.sum().item() if self.normalise else len(chosen)), reasons)

        return replace(inner, function=function, embed=None, range=self._range(inner.range))

    def _range(self, span: tuple[float, float]) -> tuple[float, float]:
        """The mean's; without ``normalise`` weights are at most 1, so 0 is within."""
        if self.normalise or not self.attenuation:
            return span
        return min(span[0], 0.0), max(span[1], 0.0)


def frames_of_segments(length: int, segments: int, pick: Literal["first", "middle", "random"]) -> list[int]:
    """One frame of each of ``segments`` equal stretches of ``length`` frames; all where there are not more.

    >>> frames_of_segments(16, 4, "first"), frames_of_segments(16, 4, "middle"), frames_of_segments(3, 4, "middle")
    ([0, 4, 8, 12], [2, 6, 10, 14], [0, 1, 2])
    """
    import torch

    segments = min(segments, length)
    starts = [i * length // segments for i in range(segments + 1)]
    sizes = [after - start for start, after in pairwise(starts)]
    if pick == "random":
        return [start + int(torch.randint(size, ())) for start, size in zip(starts, sizes, strict=False)]
    return [start + (size // 2 if pick == "middle" else 0) for start, size in zip(starts, sizes, strict=False)]


def attenuated(frames: list[int], length: int, strength: float) -> list[float]:
    """Weights exp(-strength |frame - length // 2|) of frames of a video of ``length``.

    >>> [round(weight, 4) for weight in attenuated([0, 4, 8, 12], 16, 1.0)]
    [0.0003, 0.0183, 1.0, 0.0183]
    """
    return [math.exp(-strength * abs(frame - length // 2)) for frame in frames]
