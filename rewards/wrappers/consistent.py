"""Smoothed scores: another reward averaged over a sample's nearest neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rewards import AnyReward
from rewards.base import Reward, RewardError, Scope, Scores, WrapperSettings, widest_known
from rewards.combine import groups_of, knn_smooth, widest

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Consistent(WrapperSettings):
    """Another reward, averaged over the most similar samples of the same prompt (RewardFusion)."""

    passes_gradient: ClassVar[bool] = True
    kind: Literal["consistent"] = Field("consistent", description="another reward, averaged over similar samples")
    reward: AnyReward = Field(description="reward to average: {kind: ...}")
    embed: AnyReward | None = Field(
        None,
        description="reward whose embeddings measure similarity, such as {kind: clip}; null = the averaged "
        "reward's own",
    )
    neighbours: int = Field(5, ge=1, description="maximum number of neighbours to average over")
    similarity: float = Field(0.9, ge=0, lt=1, description="minimum cosine of a neighbour (exclusive)")

    def compares(self) -> Scope | None:
        """The samples of a prompt at least."""
        return widest_known([self.reward.compares(), "group"])

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Build both.

        Raises:
            RewardError: the reward that defines similarity has no such space.
        """
        inner = self.reward.build(device)
        space = self.embed.build(device) if self.embed is not None else inner
        if space.embed is None:
            raise RewardError(f"reward {space.name!r} has no embedding; name one that has: embed: {{kind: clip}}")
        embed = space.embed

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Scores:
            scores = inner(media, prompts, group, inputs)
            near = embed(media, prompts).to(scores.values.device)
            alike = groups_of(prompts, group).to(scores.values.device)
            values = knn_smooth(scores.values, near, alike, self.neighbours, self.similarity)
            return Scores(values, scores.reasons, {"unsmoothed": scores.values, **scores.parts})

        return replace(
            inner,
            function=function,
            scope=widest([inner.scope, "group"]),
            apart=("unsmoothed",) if inner.scope == "sample" else inner.apart,
            fingerprint=lambda: f"{inner.fingerprint()} {space.fingerprint()}",
        )
