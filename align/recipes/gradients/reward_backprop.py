"""Direct reward gradients: through the reward, the decoder and the last steps of the sampler."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from align.maths import losses, samplers
from align.maths.seeds import whole
from align.recipes.base import Bench, Point, Recipe, Scored, ScoredLoss, Tensor, Terms, torch

Count = Annotated[int, Field(ge=1)]
Steps = Count | tuple[Count, Count]
"""Sampling steps, or [lowest, highest] for a random number per rollout."""


class RewardBackprop(Recipe):
    """Reward gradients through the sampler: DRaFT (arXiv 2309.17400), AlignProp (2310.03739), ReFL (2304.05977), DRTune

    DRaFT-K is ``last: K``, DRaFT-LV ``last: 1, noises: 2``, AlignProp ``last: [1, steps]``, and ReFL, of 40 steps,
    ``remaining: [1, 10], margin: 2, scale: 1e-3``. ``bridge`` is DRTune's (2405.00760).
    """

    needs = ("reward_gradient",)
    scores_groups: ClassVar[bool] = True
    """Rewards may compare the samples of a prompt, because terms are samples in order."""
    kind: Literal["reward_backprop"] = "reward_backprop"
    last: Steps = Field(
        1, description="final steps with gradient, or [lowest, highest] for a random number per rollout"
    )
    bridge: int | None = Field(
        None,
        ge=1,
        description="in place of last: steps with gradient, equally spaced from a random one; no gradient goes through "
        "the network's input, only through the sampler's own steps; null = use last",
    )
    remaining: Steps = Field(
        1,
        description="number of final steps replaced by one step to the predicted clean sample, or [lowest, highest] "
        "for a random number per rollout; 1 = all steps are taken",
    )
    noises: int = Field(0, ge=0, description="times each sample is re-noised and takes the last step with gradient")
    margin: float | None = Field(
        None, description="reward from which a sample has no gradient, as in relu(margin - reward); null = no limit"
    )
    scale: float = Field(1.0, gt=0, description="factor of the reward in the loss")
    kl: float = Field(
        0.0, ge=0, description="weight of the penalty towards the base, mean (v - v_ref)^2 at the last step"
    )

    def taken(self, steps: float) -> float:
        """How many of the sampler's steps a sample takes."""
        return steps

    def check(self, config: Any) -> list[tuple[str, str]]:
        """The sampler has as many steps."""
        steps = self.taken(getattr(getattr(config.rollout, "sampler", None), "steps", math.inf))
        found = [(name, ends(getattr(self, name))) for name in ("last", "remaining")]
        says = f"should be at most {steps}, the sampler's steps, and [lowest, highest] in this order"
        problems = [(f"recipe.{name}", says) for name, (low, high) in found if not low <= high <= steps]
        left = steps - ends(self.remaining)[1] + 1
        if self.bridge is not None and self.bridge > left:
            problems.append(("recipe.bridge", f"should be at most {left}, the steps that remaining leaves"))
        if self.bridge is not None and (self.last != 1 or self.kl):
            name = "kl" if self.kl else "last"
            problems.append((f"recipe.{name}", "applies to the last steps: leave it out with bridge"))
        return problems

    def rows_per_term(self, config: Any) -> int:
        """The sample and its copies; of several steps with gradient one is recomputed at a time."""
        return 1 + self.noises

    def terms(self, rollout: Scored, credit: Tensor) -> Terms:
        """Every sample."""
        return every_sample(rollout)

    def begin(self, sample: Tensor, rollout: Scored, bench: Bench, left: int) -> tuple[Tensor, Tensor, Any]:
        """Latents ``[M, ...]`` of the samples ``[M]`` at the first time, the times, and the steps between them."""
        return rollout.latents[sample], *rollout.course(sample, bench.generator, left)

    def loss(self, terms: Terms, rollout: Scored, bench: Bench) -> ScoredLoss:
        """The samples, generated with gradient through their last steps, and scored."""
        sample, cond, guidance = terms.sample, rollout.cond_of(terms.sample), rollout.guidance
        left = whole(*ends(self.remaining), rollout.seed, "remaining")
        last = whole(*ends(self.last), rollout.seed, "last")
        x, times, step = self.begin(sample, rollout, bench, left)
        bridge = None if self.bridge is None else samplers.spaced_steps(self.bridge, len(times) - 1, rollout.seed)
        x0 = bench.unroll(
            x, times, cond, guidance=guidance, step=step, last=None if bridge else last,
            bridge=bridge, checkpoint=last > 1 or self.bridge is not None,
        )  # fmt: skip
        point, copies = bench.point, [x0]
        drift = losses.mse(bench.velocity("policy", point), bench.velocity("reference", point)) if self.kl else None
        for k in range(self.noises):
            x = losses.x_at(x0.detach(), rollout.noise(sample, torch.full_like(sample, k)), point.t)
            v = bench.velocity("policy", Point(x, point.t, cond, guidance))
            copies.append(losses.x0_from(x, v, point.t))
        rewards, scores, media = bench.scored(torch.cat(copies), sample.repeat(len(copies)), rollout)
        rewards, known = (one.view(len(copies), -1) for one in (rewards, scores.values.isfinite()))
        value, metrics = losses.reward_backprop(rewards, known, self.margin, self.scale).value, {}
        if drift is not None:
            value, metrics = value + self.kl * drift, {"kl_velocity": drift.detach()}
        return ScoredLoss(value, metrics, scores=scores.rows(0, len(sample)), media=media[: len(sample)].cpu())


def every_sample(rollout: Scored) -> Terms:
    """One term per sample, none of which has a score yet."""
    sample = torch.arange(len(rollout.seeds))
    return Terms(sample=sample, slot=torch.zeros_like(sample), weight=torch.ones(len(sample)))


def ends(steps: Steps) -> tuple[int, int]:
    """Lowest and highest number of steps."""
    return steps if isinstance(steps, tuple) else (steps, steps)
