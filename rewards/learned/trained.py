"""A custom reward: the folder written by ``alignflow reward train``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError, Scores
from rewards.digest import digest
from rewards.frames import middles
from rewards.model_settings import ModelRewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.training.folder import load
else:
    load = lazy("rewards.training.folder:load")


class TrainedReward(ModelRewardSettings):
    """A head on CLIP features, trained by alignflow reward train."""

    kind: Literal["trained"] = Field("trained", description="a trained reward folder")
    path: str = Field(description="reward folder")
    user: str | None = Field(
        None, description="user from the training table whose preferences are scored; null = no particular user"
    )

    def load(self, device: torch.device | str) -> Reward:
        """Load backbone and head."""
        manifest, scorer = load(self.path, device, self.dtype)
        if self.user is not None and self.user not in manifest.users:
            known = ", ".join(manifest.users[:8]) or "nobody: this head knows no users"
            raise RewardError(f"{self.path} does not know user {self.user!r}; it knows {known}")
        user = None if self.user is None else manifest.users.index(self.user)

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
            if media.ndim == 5:
                media = media[:, middles(media.shape[1], self.frames)]
            found = scorer.outputs(media, prompts, user, self.chunk)
            return Scores(found[:, 0], parts={"deviation": found[:, 1]} if found.shape[1] > 1 else {})

        return Reward(
            "trained",
            function,
            differentiable=True,
            fingerprint=lambda: digest({**scorer.clip.model.state_dict(), **scorer.head.state_dict()}),
        )
