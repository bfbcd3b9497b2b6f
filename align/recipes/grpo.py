"""Group-relative policy gradient on the stochastic steps of a flow sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from align.maths import losses
from align.recipes.base import Bench, GroupRecipe, Loss, Need, Scored, Scores, Tensor, Terms, torch

if TYPE_CHECKING:
    from align.maths.samplers import Step


@dataclass(frozen=True, kw_only=True)
class StepTerms(Terms):
    """One sample at one stochastic step, its slot; ``credit [M]`` is the advantage of the sample or of its step."""

    credit: Tensor


class GRPO(GroupRecipe):
    """Flow-GRPO: clipped policy gradient over stochastic sampling steps (arXiv 2505.05470, DanceGRPO 2505.07818)

    ``rollout.sampler`` chooses the kind of step (Flow-SDE, Dance-SDE, CPS, DDIM, exact), ``rollout.sampler.window``
    which steps are stochastic and trained (Fast, MixGRPO), ``ratio: guard`` the normalised ratio of GRPO-Guard
    (arXiv 2510.22319), ``ratio: dppo`` the divergence mask of Flow-DPPO (2606.11025).
    """

    renamed: ClassVar = {"clip": "advantage_clip", "clip_range": "ratio_clip", "std": "normalise_by"}
    needs: ClassVar[tuple[Need, ...]] = ("trajectory",)
    divides_group = True
    kind: Literal["grpo"] = "grpo"
    ratio_clip: float = Field(
        1e-4,
        gt=0,
        description="clipping range of the probability ratio, whose log-probabilities are averaged over dimensions",
    )
    ratio: Literal["plain", "guard", "dppo"] = Field(
        "plain",
        description="probability ratio: plain | guard = with a log-ratio of mean 0 and equal spread at every "
        "step (GRPO-Guard) | dppo = plain, with mask_above instead of ratio_clip (Flow-DPPO)",
    )
    mask_above: float = Field(
        1e-5,
        gt=0,
        description="with ratio: dppo, KL to the old policy's step from which a term is left out if its ratio would "
        "move further from 1",
    )
    kl: float = Field(0.0, ge=0, description="weight of the KL between the step's Gaussian and the base's; 0 = none")
    advantage_clip: float = Field(5.0, gt=0, description="maximum absolute advantage; larger ones are clipped")

    @property
    def compares_logp(self) -> bool:
        """Its ratio does."""
        return True

    def terms_per_sample(self, config: Any) -> float:
        """One term per stochastic step."""
        return config.rollout.sampler.stochastic_count

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Advantages ``[N]``."""
        return self.advantage(scores, group, self.advantage_clip)

    def terms(self, rollout: Scored, credit: Tensor) -> Terms:
        """Every sample at every stochastic step."""
        count, steps = rollout.path.logp.shape
        sample = torch.arange(count).repeat_interleave(steps)
        slot = torch.arange(steps).repeat(count)
        of_term = credit[sample] if credit.ndim == 1 else credit[sample, slot]
        return StepTerms(sample=sample, slot=slot, weight=rollout.valid.float()[sample], credit=of_term)

    def steps(self, terms: StepTerms, rollout: Scored, bench: Bench) -> Callable[[str], Step]:
        """The terms' steps as a function of the role that takes them."""
        return bench.steps(rollout, terms.sample, terms.slot)

    def loss(self, terms: StepTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """Clipped surrogate, plain or guarded, plus the KL of the steps."""
        return self.surrogate(terms, rollout, self.steps(terms, rollout, bench))

    def surrogate(self, terms: StepTerms, rollout: Scored, taken: Callable[[str], Step]) -> Loss:
        """The loss of the terms' steps as the roles take them."""
        path, n, s = rollout.path, terms.sample, terms.slot
        step, old, guard = taken("policy"), path.logp[n, s], None
        advantage, mean = terms.credit.to(step.logp.device), path.mean[n, s].to(step.mean.device)
        if self.ratio == "guard":
            guard = losses.Guard(step.mean, mean, step.std, path.t_next[s] - path.t[s])
        if self.ratio == "dppo":
            moved = losses.kl_mean(step.mean, mean, step.std)
            loss = losses.masked_pg(step.logp, old, advantage, moved, self.mask_above)
        else:
            loss = losses.clipped_pg(step.logp, old, advantage, self.ratio_clip, guard=guard)
        if self.kl:
            kl = losses.kl_mean(step.mean, taken("reference").mean, step.std)
            loss = losses.Loss(loss.value + self.kl * kl, {**loss.metrics, "kl_step": kl.detach()})
        return loss
