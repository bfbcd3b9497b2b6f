"""DiffusionNFT: the policy contrasted with its past values on noised samples; no likelihoods, no stochastic sampler."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from align.maths import losses, weights
from align.recipes.base import (
    Bench,
    ForwardRecipe,
    GroupRecipe,
    Loss,
    NoisedTerms,
    OldPolicy,
    Scored,
    Scores,
    Tensor,
    old_policy_decay,
)


class NFT(GroupRecipe, ForwardRecipe):
    """DiffusionNFT: positive and negative velocities around the old policy, weighted by reward (arXiv 2509.16117)

    Group-normalised advantages become a probability ``r`` that a sample is good; the loss pulls
    ``v+ = (1-b) v_old + b v`` to good samples and ``v- = (1+b) v_old - b v`` to bad ones.
    """

    renamed: ClassVar = {"clip": "advantage_clip", "std": "normalise_by", "old": "behaviour_decay"}
    behaviour = "behaviour"
    divides_group = True
    kind: Literal["nft"] = "nft"
    beta: float = Field(
        1.0, gt=0, description="distance of v+ and v- from v_old, relative to v - v_old; small values take larger steps"
    )
    kl: float = Field(1e-4, ge=0, description="weight of the penalty towards the base, mean (v - v_ref)^2; 0 = none")
    advantage_clip: float = Field(
        5.0, gt=0, description="advantage that counts as certainty (probability 0 or 1); larger ones are clipped"
    )
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = Field(
        "all",
        description="advantages used: all = both signs | positive_only, negative_only = the other sign set to 0 "
        "| one_only = 1 if positive, else 0 | binary = the sign only",
    )
    behaviour_decay: OldPolicy = Field(
        "linear",
        description="decay of the old policy at rollout n: on_policy = 0 | linear = min(0.001 n, 0.5) | delayed "
        "= 0 until 75, then rising by 0.0075 per rollout to 0.999",
    )

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Probability in [0, 1] that a sample is good; 1/2 for a group without differences."""
        advantage = self.advantage(scores, group, self.advantage_clip)
        return weights.nft_probability(advantage, clip=self.advantage_clip, mode=self.mode)

    def loss(self, terms: NoisedTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """The contrast of both velocities plus the penalty towards the base."""
        x0, _, point = self.noised(terms, rollout)
        v, v_old = bench.velocity("policy", point), bench.velocity("behaviour", point)
        loss = losses.nft(x0, point.x, point.t, v, v_old, terms.credit.to(x0.device), self.beta)
        return self.anchored(loss, point, bench)

    def decay(self, role: str, step: int) -> float:
        """The published schedules 0, 1 and 2."""
        return old_policy_decay(self.behaviour_decay, step)
