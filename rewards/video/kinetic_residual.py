"""Constancy of acceleration, as of thrown and falling objects (NewtonRewards)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rewards.base import Reward
from rewards.model_settings import FlowRewardSettings
from rewards.videos import at_least, flow_function, video_flow

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class KineticResidual(FlowRewardSettings):
    """Negative change of acceleration in a video's optical flow: 0 = constant acceleration (NewtonRewards).

    A video that stands still has 0 too, so it needs another reward beside it: ``motion_degree``, ``mass_conservation``.
    """

    kind: Literal["kinetic_residual"] = Field("kinetic_residual", description="negative change of acceleration")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Nothing to load but your own flow."""
        flow = flow_function(self.flow)

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            return -jerk(video_flow(at_least(media, 4, "kinetic_residual"), flow, self.chunk))

        return Reward("kinetic_residual", function, range=(float("-inf"), 0.0), differentiable=True)


def jerk(flow: Tensor) -> Tensor:
    """Mean over times and pixels of ``|flow[t + 1] - 2 flow[t] + flow[t - 1]|^2``: ``[N, T, 2, H, W]`` -> ``[N]``."""
    change = flow[:, 2:] - 2 * flow[:, 1:-1] + flow[:, :-2]
    return change.square().sum(2).mean((1, 2, 3))
