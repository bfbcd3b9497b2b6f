"""Perceptual similarity to the prompt's image: the cosine of a vision model's features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rewards.base import Reward
from rewards.digest import digest
from rewards.frames import by_frame
from rewards.model_settings import VisionRewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class FeatureSimilarity(VisionRewardSettings):
    """Cosine between a vision model's features of the image and of the prompt's image.

    A perceptual similarity, but neither LPIPS nor DreamSim: no weights here were trained on people's judgements.
    """

    kind: Literal["feature_similarity"] = Field(
        "feature_similarity", description="feature similarity to the prompt's image"
    )

    def load(self, device: torch.device | str) -> Reward:
        """Load the model."""
        features = self.vision(device)

        def function(media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor) -> Tensor:
            goal = features.of_videos(image[:, None], self.chunk)[:, 0].detach()
            return by_frame(media, lambda seen, of: (features(seen) * goal[of]).sum(-1), self.chunk, self.frames)

        return Reward(
            "feature_similarity",
            function,
            range=(-1.0, 1.0),
            differentiable=True,
            wants=("image",),
            fingerprint=lambda: digest(features.model.state_dict()),
        )
