"""Centred Reward Distillation: differences of implicit rewards within a prompt regress onto those of the rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from align.maths import losses, matching, weights
from align.recipes.base import (
    Bench,
    Fraction,
    GroupTerms,
    OldPolicy,
    Scored,
    Scores,
    Tensor,
    WholeGroupRecipe,
    old_policy_decay,
)


class CRD(WholeGroupRecipe):
    """Centred Reward Distillation: implicit rewards match rewards, centred within a prompt (arXiv 2603.14128)

    The implicit reward of a sample is how much better the policy predicts it than the anchor does. Defaults are those
    of the authors' trainer in Flow-Factory, except that a group shares its time, since the size of an implicit reward
    depends on it, and is centred by itself.
    """

    behaviour = "behaviour"
    kind: Literal["crd"] = "crd"
    beta: float = Field(1.0, gt=0, description="factor of the implicit reward; small values take larger steps")
    form: Literal["mse", "bce"] = Field("mse", description="squared error, or cross-entropy of the sigmoids")
    adaptive: bool = Field(True, description="divide every error by its mean absolute value")
    temperature: float | None = Field(
        None,
        ge=0,
        description="centre at softmax(+-reward / temperature), one after the other, instead of the mean; 0 = at the "
        "best and the worst; null = at the mean",
    )
    advantage_clip: float = Field(
        5.0, gt=0, description="advantage that is mapped to reward 1, its negative to 0; larger ones are clipped"
    )
    shared_noise: bool = Field(False, description="whether the samples of a prompt are re-noised with the same noise")
    behaviour_decay: OldPolicy = Field("delayed", description="decay of the policy that samples, as in nft")
    anchor_decay: tuple[Fraction, Fraction, Fraction] = Field(
        (0.25, 0.005, 0.999), description="decay of the anchor after rollout n, [a, b, c]: min(a + b n, c)"
    )
    kl: float = Field(0.1, ge=0, description="weight of the penalty towards the base, mean (v - v_ref)^2; 0 = none")
    guidance: float = Field(4.5, ge=0, description="classifier-free guidance scale of the base; 1 = no guidance")
    adaptive_kl: bool = Field(
        True, description="multiply the penalty by the sample's reward in [0, 1], at least 1e-4 / kl"
    )

    def roles(self, config: Any) -> tuple[str, ...]:
        """The anchor for the implicit reward."""
        return (*super().roles(config), "anchor")

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Rewards in [0, 1]; 1/2 for the mean of a group."""
        return weights.nft_probability(self.advantage(scores, group, self.advantage_clip), clip=self.advantage_clip)

    def loss(self, terms: GroupTerms, rollout: Scored, bench: Bench) -> losses.Loss:  # type: ignore[override]
        """Regression onto the centred rewards, plus the penalty towards the base."""
        x0, eps, point = self.noised(terms, rollout)
        v, v_old = bench.velocity("policy", point), bench.velocity("anchor", point)
        shape, reward, valid = terms.members.shape, terms.credit.to(x0.device), terms.valid.to(x0.device)
        implicit = matching.implicit_reward(v, v_old, eps - x0, adaptive=self.adaptive).unflatten(0, shape)
        loss = matching.crd(implicit, reward, valid, self.beta, kind=self.form, temperature=self.temperature)
        value = loss.value * self.advantage_clip / self.beta
        if not self.kl:
            return losses.Loss(value, loss.metrics)
        guided = replace(point, guidance=self.guidance) if self.guidance != 1 else point
        drift = losses.mse(v, bench.velocity("reference", guided)).unflatten(0, shape)
        least = min(1e-4 / self.kl, 1.0)
        weight = self.kl * (least + reward * (1 - least)) if self.adaptive_kl else self.kl
        pull, drift = matching.group_mean(weight * drift, valid), matching.group_mean(drift.detach(), valid)
        return losses.Loss(value + pull, {**loss.metrics, "kl_velocity": drift})

    def decay(self, role: str, step: int) -> float:
        """The published schedules."""
        return old_policy_decay(self.behaviour_decay, step) if role == "behaviour" else super().decay(role, step)
