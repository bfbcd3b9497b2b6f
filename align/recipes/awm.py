"""Advantage Weighted Matching: a clipped policy gradient whose log-probability is a flow-matching error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from align.maths import losses, matching
from align.recipes.base import AnchorRecipe, Bench, GroupRecipe, NoisedTerms, Scored, Scores, Tensor, torch


class AWM(GroupRecipe, AnchorRecipe):
    """Advantage Weighted Matching: policy gradient on flow-matching errors of noised samples (arXiv 2509.25050)

    ``exp`` of how much smaller the error has become since the rollout is the ratio of a clipped surrogate. Two
    penalties keep the policy near the base and the anchor, a moving average. Defaults are those of the authors' code.
    """

    behaviour = "behaviour"
    divides_group = True
    kind: Literal["awm"] = "awm"
    weighting: matching.Weighting = Field(
        "ghuber",
        description="log-probability of an error e: uniform = -e | t = -t e | t2 = -t^2 e | huber = -t sqrt(e) "
        "| ghuber = -t e^p / p",
    )
    power: float = Field(0.25, gt=0, le=1, description="exponent p of ghuber")
    ratio: Literal["timestep", "mean"] = Field(
        "timestep", description="ratio of every noised copy, or of a sample's mean over its copies"
    )
    ratio_clip: float = Field(1.0, gt=0, description="clipping range of the ratio")
    advantage_clip: float = Field(
        5.0, gt=0, description="maximum absolute advantage, by which all are divided; larger ones are clipped"
    )
    kl: float = Field(1e-3, ge=0, description="weight of the penalty towards the base, mean (v - v_ref)^2; 0 = none")
    anchor: float = Field(1.0, ge=0, description="weight of the penalty towards the anchor; 0 = none")

    def roles(self, config: Any) -> tuple[str, ...]:
        """The anchor where it has a weight."""
        return (*super().roles(config), *(("anchor",) if self.anchor else ()))

    def terms_per_sample(self, config: Any) -> float:
        """One term per noised copy, or all of them in one."""
        return self.timesteps if self.ratio == "timestep" else 1

    def rows_per_term(self, config: Any) -> int:
        """A noised copy, or all of a sample."""
        return 1 if self.ratio == "timestep" else self.timesteps

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Advantages in [-1, 1]."""
        return self.advantage(scores, group, self.advantage_clip) / self.advantage_clip

    def terms(self, rollout: Scored, credit: Tensor) -> NoisedTerms:
        """Every sample at :attr:`timesteps` times; for the ratio of the mean, as one term with ``t [M, timesteps]``."""
        each = NoisedTerms.of(rollout, credit, rollout.valid.float(), range(self.timesteps), self.t_range)
        if self.ratio == "timestep":
            return each
        return replace(each[:: self.timesteps], t=each.t.unflatten(0, (-1, self.timesteps)))

    def loss(self, terms: NoisedTerms, rollout: Scored, bench: Bench) -> losses.Loss:  # type: ignore[override]
        """Clipped surrogate plus the pulls to base and anchor."""
        x0, eps, point = self.noised(_copies(terms), rollout)
        v, v_old = bench.velocity("policy", point), bench.velocity("behaviour", point)

        def of_terms(value: Tensor) -> Tensor:
            return value.unflatten(0, (len(terms), -1)).mean(1)

        def logp(velocity: Tensor) -> Tensor:
            return of_terms(matching.fm_logp(losses.mse(velocity, eps - x0), point.t, self.weighting, self.power))

        loss = losses.clipped_pg(logp(v), logp(v_old), terms.credit.to(x0.device), self.ratio_clip)
        value, metrics = loss.value, loss.metrics
        for role, weight, name in (("reference", self.kl, "kl_velocity"), ("anchor", self.anchor, "kl_anchor")):
            if weight:
                drift = of_terms(losses.mse(v, bench.velocity(role, point)))
                value, metrics = value + weight * drift, {**metrics, name: drift.detach()}
        return losses.Loss(value, metrics)


def _copies(terms: NoisedTerms) -> NoisedTerms:
    """One term per noised copy."""
    if terms.t.ndim == 1:
        return terms
    count = terms.t.shape[1]
    rows = torch.arange(len(terms)).repeat_interleave(count)
    return replace(terms[rows], slot=torch.arange(count).repeat(len(terms)), t=terms.t.flatten())
