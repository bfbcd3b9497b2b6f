"""Consistency of the subject through a video (VBench's subject consistency)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rewards.base import Reward
from rewards.digest import digest
from rewards.frames import middles
from rewards.model_settings import VISION_MODEL, VisionRewardSettings
from rewards.videos import at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class IdentityConsistency(VisionRewardSettings):
    """Similarity of each frame's features to those of the first and the preceding frame (VBench).

    A video that stands still has 1, so it needs a reward of motion beside it.
    """

    kind: Literal["identity_consistency"] = Field(
        "identity_consistency", description="similarity between the frames of a video"
    )
    model: str = Field("facebook/dino-vitb16", description=VISION_MODEL)

    def load(self, device: torch.device | str) -> Reward:
        """Load the model."""
        features = self.vision(device)

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            videos = at_least(media, 2, "identity_consistency")
            chosen = videos[:, middles(videos.shape[1], self.frames and max(self.frames, 2))]
            return consistency(features.of_videos(chosen, self.chunk))

        return Reward(
            "identity_consistency",
            function,
            range=(0.0, 1.0),
            differentiable=True,
            fingerprint=lambda: digest(features.model.state_dict()),
        )


def consistency(features: Tensor) -> Tensor:
    """Unit rows ``[N, F, D]`` -> ``[N]``: mean over all frames but the first of (a + b) / 2, where a and b are the
    cosines with the frame before and with the first, negative ones as 0."""
    before = (features[:, 1:] * features[:, :-1]).sum(-1).clamp(min=0)
    first = (features[:, 1:] * features[:, :1]).sum(-1).clamp(min=0)
    return ((before + first) / 2).mean(1)
