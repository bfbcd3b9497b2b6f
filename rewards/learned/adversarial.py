"""A reward that learns to recognise references while the policy learns to match them (Adv-GRPO)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward
from rewards.model_settings import VisionRewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.images import read_folder
    from rewards.training.discriminator import Discriminator
else:
    read_folder = lazy("rewards.images:read_folder")
    Discriminator = lazy("rewards.training.discriminator:Discriminator")


class Adversarial(VisionRewardSettings):
    """Similarity to reference images by a discriminator that is updated every rollout (Adv-GRPO, arXiv 2511.20256).

    It knows nothing of prompts: mix it with a reward that does. Scores of different updates cannot be compared.
    """

    kind: Literal["adversarial"] = Field(
        "adversarial", description="similarity to references, with a discriminator trained during the run"
    )
    references: str = Field(description="folder of reference images, or shapes: renders of the embedded world")
    hidden: int = Field(512, ge=1, description="width of the discriminator's hidden layer")
    lr: float = Field(1e-4, gt=0, description="learning rate of the discriminator's Adam")
    patches: float = Field(
        0.3, ge=0, le=1, description="share of the patch scores in the total score, and weight of their loss"
    )
    only_behind: bool = Field(False, description="skip updates while references already score above the samples")
    seed: int = Field(
        0, ge=0, description="random seed of the initial weights and of the references chosen in each update"
    )

    def load(self, device: torch.device | str) -> Reward:
        """Load the model and embed the references."""
        from torch.nn import functional as F

        vision = self.vision(device)

        def features(media: Tensor) -> Tensor:
            videos = media if media.ndim == 5 else media[:, None]
            return F.normalize(vision.of_videos(videos, self.chunk, patches=True).mean(1), dim=-1)

        return Discriminator(
            features,
            read_folder(self.references),
            hidden=self.hidden,
            lr=self.lr,
            seed=self.seed,
            patches=self.patches,
            only_behind=self.only_behind,
        ).reward()
