"""Group-relative policy gradient on the stochastic steps of a flow sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from align.maths import advantages, losses
from align.recipes.base import Need, Recipe, Terms
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.maths.losses import Loss
    from align.maths.samplers import Step
    from align.rollout import bench as benches
    from align.rollout.bench import Bench
    from align.rollout.rollout import Scored
    from rewards.base import Scores
else:
    torch, benches = lazy("torch"), lazy("align.rollout.bench")


@dataclass(frozen=True, kw_only=True)
class StepTerms(Terms):
    """One sample at one stochastic step, its slot; ``credit [M]`` is the sample's advantage."""

    credit: Tensor


class GRPO(Recipe):
    """Flow-GRPO: clipped policy gradient over stochastic sampling steps (arXiv 2505.05470, DanceGRPO 2505.07818)

    ``rollout.sampler`` chooses the kind of step (Flow-SDE, Dance-SDE, CPS, DDIM, exact), ``rollout.sampler.window``
    which steps are stochastic and trained (Fast, MixGRPO), ``ratio: guard`` the normalised ratio of GRPO-Guard
    (arXiv 2510.22319).
    """

    renamed: ClassVar[dict[str, str]] = {"clip": "advantage_clip", "clip_range": "ratio_clip", "std": "normalise_by"}
    needs: ClassVar[tuple[Need, ...]] = ("trajectory",)
    compares_group: ClassVar[bool] = True
    kind: Literal["grpo"] = "grpo"
    ratio_clip: float = Field(
        1e-4,
        gt=0,
        description="clipping range of the probability ratio, whose log-probabilities are averaged over dimensions",
    )
    ratio: Literal["plain", "guard"] = Field(
        "plain",
        description="probability ratio: plain | guard = normalised to mean 0 and equal spread at every step "
        "(GRPO-Guard)",
    )
    kl: float = Field(0.0, ge=0, description="weight of the KL between the step's Gaussian and the base's; 0 = none")
    normalise_by: advantages.Divisor = Field(
        "global",
        description="divisor of the advantage r - mean_group: group = std within the group | global = std of all "
        "rewards | centred = std of all rewards minus their group means | none = 1",
    )
    advantage_clip: float = Field(5.0, gt=0, description="maximum absolute advantage; larger ones are clipped")

    def roles(self, config: Any) -> tuple[str, ...]:
        """The reference, where the KL has a weight; the ratio is taken to the stored log-probabilities."""
        return ("reference",) if self.kl else ()

    def terms_per_sample(self, config: Any) -> float:
        """One term per stochastic step."""
        return config.rollout.sampler.stochastic_count

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Advantages ``[N]``."""
        return advantages.group_advantage(
            scores.values, group, normalise_by=self.normalise_by, clip=self.advantage_clip
        )

    def terms(self, rollout: Scored, credit: Tensor) -> Terms:
        """Every sample at every stochastic step."""
        assert rollout.trajectory is not None
        count, steps = rollout.trajectory.logp.shape
        sample = torch.arange(count).repeat_interleave(steps)
        slot = torch.arange(steps).repeat(count)
        return StepTerms(sample=sample, slot=slot, weight=rollout.valid.float()[sample], credit=credit[sample])

    def loss(self, terms: StepTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """Clipped surrogate, plain or guarded, plus the KL of the steps."""
        path = rollout.trajectory
        assert path is not None
        n, s = terms.sample, terms.slot
        t, t_next = path.t[s], path.t_next[s]
        point = benches.Point(path.x[n, s], t, rollout.cond_of(n), rollout.guidance)

        def taken(role: str) -> Step:
            return rollout.step(point.x, bench.velocity(role, point), t, t_next, x_next=path.x_next[n, s])

        step = taken("policy")
        guard = None
        if self.ratio == "guard":
            guard = losses.Guard(step.mean, path.mean[n, s], step.std, t_next - t)
        advantage = terms.credit.to(point.x.device)
        loss = losses.clipped_pg(step.logp, path.logp[n, s], advantage, self.ratio_clip, guard=guard)
        if self.kl:
            kl = losses.kl_mean(step.mean, taken("reference").mean, step.std)
            loss = losses.Loss(loss.value + self.kl * kl, {**loss.metrics, "kl_step": kl.detach()})
        return loss
