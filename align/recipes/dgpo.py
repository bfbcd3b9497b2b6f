"""Direct Group Preference Optimization: the better samples of a prompt against the worse, as one preference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from align.maths import advantages, losses, matching
from align.recipes.base import Bench, GroupTerms, Scored, Scores, Tensor, WholeGroupRecipe


class DGPO(WholeGroupRecipe):
    """DGPO: the good samples of a prompt against the bad ones as one preference, same noise (arXiv 2510.08425)

    The flow-matching error of every sample is weighted by its advantage, and that of the group by how little the
    policy yet prefers its good samples. Defaults are those of the authors' code (``config/dgpo_wocfg_emaref.py``).
    """

    kind: Literal["dgpo"] = "dgpo"
    normalise_by: advantages.Divisor = Field("group", description="divisor of the advantage, as in the other recipes")
    beta: float = Field(2000.0, gt=0, description="sharpness of the group's weight; errors are means over dimensions")
    gate_reference: Literal["anchor", "base"] = Field(
        "anchor", description="policy that the group's weight compares with: the moving average or the base"
    )
    ratio_clip: float | None = Field(
        1e-5,
        gt=0,
        description="change of a sample's error from the anchor's beyond which it has no gradient; null = no limit",
    )
    advantage_clip: float = Field(5.0, gt=0, description="maximum absolute advantage; larger ones are clipped")
    kl: float = Field(1e-3, ge=0, description="weight of the penalty towards the base, mean (v - v_ref)^2; 0 = none")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance scale of the base; 1 = no guidance")

    def roles(self, config: Any) -> tuple[str, ...]:
        """The base for gate and penalty, the anchor for gate and clip, each where it is used."""
        base = self.kl > 0 or self.gate_reference == "base"
        anchor = self.ratio_clip is not None or self.gate_reference == "anchor"
        return (*(("reference",) if base else ()), *(("anchor",) if anchor else ()))

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Advantages ``[N]``."""
        return self.advantage(scores, group, self.advantage_clip)

    def loss(self, terms: GroupTerms, rollout: Scored, bench: Bench) -> losses.Loss:  # type: ignore[override]
        """Gated errors, weighted by advantages, plus the penalty towards the base."""
        x0, eps, point = self.noised(terms, rollout)
        guided = replace(point, guidance=self.guidance) if self.guidance != 1 else point
        roles = self.roles(None)
        v = {"policy": bench.velocity("policy", point)}
        if "anchor" in roles:
            v["anchor"] = bench.velocity("anchor", point)
        if "reference" in roles:
            v["reference"] = bench.velocity("reference", guided)
        shape, device = terms.members.shape, x0.device
        error = {name: losses.mse(velocity, eps - x0).unflatten(0, shape) for name, velocity in v.items()}
        credit, valid = terms.credit.to(device), terms.valid.to(device)
        before = error["reference" if self.gate_reference == "base" else "anchor"]
        loss = matching.dgpo(
            error["policy"], before, credit, valid, self.beta, error_old=error.get("anchor"), clip=self.ratio_clip
        )
        if not self.kl:
            return loss
        drift = matching.group_mean(losses.mse(v["policy"], v["reference"]).unflatten(0, shape), valid)
        return losses.Loss(loss.value + self.kl * drift, {**loss.metrics, "kl_velocity": drift.detach()})
