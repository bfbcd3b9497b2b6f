"""ImageReward (arXiv 2304.05977): BLIP fine-tuned on expert comparisons of images for a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward
from rewards.frames import by_frame
from rewards.model_settings import ModelRewardSettings
from rewards.packages import image_reward_reward

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks.blip import BlipReward
else:
    BlipReward = lazy("rewards.networks.blip:BlipReward")


class ImageReward(ModelRewardSettings):
    """ImageReward: a BLIP that reads image and prompt together, about -2.3 to 2, mean 0.

    Only the middle square of an image and the first 35 tokens of a prompt count.
    """

    kind: Literal["image_reward"] = Field("image_reward", description="ImageReward")
    weights: str = Field("THUDM/ImageReward/ImageReward.pt", description="weight file, or owner/name/file on the hub")
    tokenizer: str = Field("google-bert/bert-base-uncased", description="folder or hub id of BERT's tokenizer")
    backend: Literal["native", "package"] = Field(
        "native",
        description="native = built in | package = the installed image-reward, one image at a time, without gradient",
    )
    med_config: str = Field("THUDM/ImageReward/med_config.json", description="settings file of the package")

    def gradient(self) -> bool | None:
        """Only the native backend has one."""
        return self.backend == "native"

    def load(self, device: torch.device | str) -> Reward:
        """Load weights and tokenizer, or the package."""
        if self.backend == "package":
            return image_reward_reward(self.weights, self.med_config, device, self.frames)

        blip = BlipReward.load(self.weights, self.tokenizer, self.dtype, device)

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            def score(images: Tensor, samples: Tensor) -> Tensor:
                return blip.score(images, [prompts[i] for i in samples.tolist()])

            return by_frame(media, score, self.chunk, self.frames)

        return Reward("image_reward", function, differentiable=True)
