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
    torch = lazy("torch")
    load, load_gram = lazy("rewards.training.folder:load"), lazy("rewards.training.folder:load_gram")
    trust, newcomer = lazy("rewards.training.trust"), lazy("rewards.training.newcomer")


class TrainedReward(ModelRewardSettings):
    """A head on features of a CLIP or of a vision-language model, trained by alignflow reward train.

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
            raise ValueError("user and pairs both select whose preferences are scored; give only one of them")
        return self

    def load(self, device: torch.device | str) -> Reward:
        """Load backbone and head."""
        manifest, scorer = load(self.path, device, self.dtype, self.chunk)
        if self.user is not None and self.user not in manifest.users:
            known = ", ".join(manifest.users[:8]) or "null: this head has no users"
            raise RewardError(f"{self.path} has no user {self.user!r}; it has {known}")
        user: int | Tensor | None = None if self.user is None else manifest.users.index(self.user)
        if self.pairs is not None:
            user = newcomer.user_of(scorer, newcomer.read_pairs(self.pairs), self.chunk)
        told = {} if user is None or isinstance(user, int) else {"newcomer": user}
        gram = load_gram(self.path)
        inverse = None if gram is None else trust.inverse_of(gram, self.ridge)

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
            if media.ndim == 5:
                media = media[:, middles(media.shape[1], self.frames)]
            refused = scorer.refused(media, prompts)
            rows = [row for row in range(len(prompts)) if row not in refused]
            image, text = scorer.read(media[rows], [prompts[row] for row in rows], self.chunk)
            found = scorer.outputs(image, text, user)
            parts = dict(zip(manifest.head.parts, found.unbind(1)[1:], strict=False))
            if inverse is not None:
                parts["distance"] = trust.distance(scorer.head.features(image, text), inverse, self.norm)
            columns = {name: _placed(value, rows, len(prompts)) for name, value in parts.items()}
            return Scores(_placed(found[:, 0], rows, len(prompts)), refused, columns)

        return Reward(
            "trained",
            function,
            differentiable=True,
            fingerprint=lambda: digest({**scorer.state_dict(), **told}),
        )


def _placed(values: Tensor, rows: list[int], count: int) -> Tensor:
    """``values [n]`` at the rows of ``[count]``; the others are NaN."""
    if len(rows) == count:
        return values
    return values.new_full((count,), torch.nan).index_put((torch.tensor(rows, device=values.device),), values)
