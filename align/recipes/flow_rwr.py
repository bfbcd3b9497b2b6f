"""Reward-weighted regression: the flow-matching loss on the policy's own samples, weighted by their rewards."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.maths import losses, weights
from align.recipes.base import Bench, ForwardRecipe, Loss, NoisedTerms, Scored, Scores, Tensor


class FlowRWR(ForwardRecipe):
    """Reward-weighted regression on flows: samples weighted by exp(r / temperature) (VideoAlign, arXiv 2501.13918)

    On stored samples that nothing compares every weight is 1: plain fine-tuning. All weights are positive, so the
    policy also learns its own sampler's blur: use enough sampling steps in the rollout and a penalty to the base, or
    ``control_variate``.
    """

    compares_group = True
    kind: Literal["flow_rwr"] = "flow_rwr"
    temperature: float = Field(
        0.5,
        gt=0,
        description="temperature in exp(r / temperature), in standard deviations of the group (in reward units "
        "if standardise is false)",
    )
    standardise: bool = Field(
        True, description="divide rewards by the group's standard deviation first, so that temperature has no unit"
    )
    max_weight: float | None = Field(
        None, gt=0, description="maximum weight; weights average 1 within a group; null = no maximum"
    )
    control_variate: bool = Field(
        False,
        description="use the old policy's velocity as a control variate for the unit-weight part of the "
        "regression target",
    )
    kl: float = Field(0.1, ge=0, description="weight of the penalty towards the base, mean (v - v_ref)^2; 0 = none")

    @property
    def compares(self) -> bool:
        """Weights of 1 train on the samples, unless the control variate removes that part."""
        return self.control_variate

    def roles(self, config: Any) -> tuple[str, ...]:
        """The behaviour policy for the control variate, the reference for the penalty towards the base."""
        return (*(("behaviour",) if self.control_variate else ()), *super().roles(config))

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Positive weights with mean 1 in every group."""
        return weights.softmax_weight(
            scores.values, group, self.temperature, clip=self.max_weight, standardise=self.standardise
        )

    def loss(self, terms: NoisedTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """Weighted flow matching plus the penalty towards the base."""
        x0, eps, point = self.noised(terms, rollout)
        v = bench.velocity("policy", point)
        v_old = bench.velocity("behaviour", point) if self.control_variate else None
        loss = losses.weighted_fm(v, x0, eps, terms.credit.to(x0.device), v_old)
        return self.anchored(loss, point, bench)
