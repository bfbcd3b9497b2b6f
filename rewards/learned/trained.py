"""A custom reward: the folder written by ``alignflow reward train``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError, Scores
from rewards.digest import digest
from rewards.frames import middles
from rewards.model_settings import ModelRewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.training import newcomer, trust
    from rewards.training.folder import load, load_gram
else:
    load, load_gram = lazy("rewards.training.folder:load"), lazy("rewards.training.folder:load_gram")
    trust, newcomer = lazy("rewards.training.trust"), lazy("rewards.training.newcomer")


class TrainedReward(ModelRewardSettings):
    """A head on CLIP features, trained by alignflow reward train.

    Its part ``distance`` is how far a sample's features are from those of the training table: ``sqrt(z V^-1 z)`` with
    ``V = ridge I + sum of z z^T`` over the table. Where it is large the score is a guess. A folder from before these
    sums were kept has no such part.
    """

    kind: Literal["trained"] = Field("trained", description="a trained reward folder")
    path: str = Field(description="reward folder")
    user: str | None = Field(
        None, description="user from the training table whose preferences are scored; null = no particular user"
    )
    pairs: str | None = Field(
        None,
        description="table of a few preferences (.jsonl with prompt, chosen, rejected) of a user who is not in the "
        "training table, whose preferences are then scored; null = none",
    )
    ridge: float = Field(1.0, gt=0, description="ridge of V in the part distance")
    norm: Literal["quadratic", "product"] = Field(
        "quadratic", description="norm in the part distance: quadratic = sqrt(z V^-1 z) | product = |z V^-1|"
    )

    @model_validator(mode="after")
    def _one_user(self) -> TrainedReward:
        if self.user is not None and self.pairs is not None:
            raise ValueError("user and pairs both say whose preferences are scored; name one of them")
        return self

    def load(self, device: torch.device | str) -> Reward:
        """Load backbone and head."""
        manifest, scorer = load(self.path, device, self.dtype)
        if self.user is not None and self.user not in manifest.users:
            known = ", ".join(manifest.users[:8]) or "nobody: this head knows no users"
            raise RewardError(f"{self.path} does not know user {self.user!r}; it knows {known}")
        user: int | Tensor | None = None if self.user is None else manifest.users.index(self.user)
        if self.pairs is not None:
            user = newcomer.user_of(scorer, newcomer.read_pairs(self.pairs), self.chunk)
        told = {} if user is None or isinstance(user, int) else {"newcomer": user}
        gram = load_gram(self.path)
        inverse = None if gram is None else trust.inverse_of(gram, self.ridge)

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
            if media.ndim == 5:
                media = media[:, middles(media.shape[1], self.frames)]
            image, text = scorer.read(media, prompts, self.chunk)
            found = scorer.outputs(image, text, user)
            parts = {"deviation": found[:, 1]} if found.shape[1] > 1 else {}
            if inverse is not None:
                parts["distance"] = trust.distance(scorer.head.features(image, text), inverse, self.norm)
            return Scores(found[:, 0], parts=parts)

        return Reward(
            "trained",
            function,
            differentiable=True,
            fingerprint=lambda: digest({**scorer.clip.model.state_dict(), **scorer.head.state_dict(), **told}),
        )
