"""Amount of motion in a video: the fastest twentieth of its optical flow (after VBench's dynamic degree)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rewards.base import Reward
from rewards.model_settings import FlowRewardSettings
from rewards.videos import at_least, flow_function, video_flow

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FASTEST, SIDE = 0.05, 256


class MotionDegree(FlowRewardSettings):
    """Speed of the fastest twentieth of a video's pixels, in pixels per frame at a shorter side of 256.

    VBench takes a pair of frames for moving above 6, at 8 frames a second and with RAFT's flow.
    """

    kind: Literal["motion_degree"] = Field("motion_degree", description="speed of the fastest pixels")
    enough: float | None = Field(
        None,
        gt=0,
        description="speed that scores 1; lower speeds score in proportion, higher ones also 1; null = score the "
        "speed itself",
    )

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Nothing to load but your own flow."""
        flow = flow_function(self.flow)

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            speed = fastest(video_flow(at_least(media, 2, "motion_degree"), flow, self.chunk))
            return speed if self.enough is None else (speed / self.enough).clamp(max=1)

        highest = float("inf") if self.enough is None else 1.0
        return Reward("motion_degree", function, range=(0.0, highest), differentiable=True)


def fastest(flow: Tensor) -> Tensor:
    """``[N, T, 2, H, W]`` in pixels -> ``[N]``: mean over times of the mean speed of the fastest twentieth."""
    height, width = flow.shape[-2:]
    squared = flow.square().sum(2).flatten(2)
    top = squared.topk(max(int(FASTEST * height * width), 1), dim=2).values
    # the root has no slope where nothing moves
    speed = (top + 1e-12).sqrt() - 1e-6
    return speed.mean((1, 2)) * SIDE / min(height, width)
