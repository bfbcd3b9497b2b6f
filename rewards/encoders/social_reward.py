"""Social Reward (arXiv 2402.09872): OpenAI's CLIP ViT-L/14 fine-tuned on which images a community edits further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward
from rewards.model_settings import ModelRewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks.clip import Clip
else:
    Clip = lazy("rewards.networks.clip:Clip")


class SocialReward(ModelRewardSettings):
    """Social Reward: cosine of a CLIP ViT-L/14 trained on a community's edits.

    Its authors published how it is trained and read, not its weights: train them, or give your own.
    """

    kind: Literal["social_reward"] = Field("social_reward", description="Social Reward")
    weights: str = Field(
        description="state dict of the fine-tuned CLIP as saved by the authors' script, or a CLIPModel"
    )
    processor: str = Field("openai/clip-vit-large-patch14", description="folder or hub id of the tokenizer")

    def load(self, device: torch.device | str) -> Reward:
        """Load model and tokenizer."""
        clip = Clip.load(
            self.weights,
            self.processor,
            self.dtype,
            device,
            preprocess="cropped",
            quick_gelu=True,
            repair=True,
        )

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            return clip.cosine(media, prompts, self.chunk, self.frames)

        return Reward("social_reward", function, range=(-1.0, 1.0), differentiable=True)
