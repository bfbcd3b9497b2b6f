"""SRPO: reward gradients at any noise level, by recovering the sample from known noise, and words that steer them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.maths import direct, losses
from align.maths.seeds import derive
from align.recipes import base
from align.recipes.base import Bench, Fraction, Point, Recipe, Scored, ScoredLoss, Tensor, Terms, torch
from align.recipes.gradients.reward_backprop import every_sample

Ends = tuple[float, float]


class SRPO(Recipe):
    """SRPO: one step at any noise level, recovered by known noise; rewards of control words (arXiv 2509.06942)

    A sample is generated without gradient and re-noised with its own initial noise. One step denoises it and one
    inverts it, with the two words exchanged; both have a gradient. Defaults are those of the authors' code.
    Direct-Align alone is without words and ``extra_inverted: null``.
    """

    needs = ("reward_gradient",)
    kind: Literal["srpo"] = "srpo"
    positive: tuple[str, ...] = Field((), description="desired words, one per rollout; empty = the prompt alone")
    negative: tuple[str, ...] = Field((), description="undesired words, one per rollout; empty = the prompt alone")
    template: str = Field("{word}. {prompt}", description="prompt of the reward, with {word} and {prompt}")
    timesteps: int = Field(1, ge=1, description="noise levels per sample, one in each of this many equal slices")
    t_range: tuple[Fraction, Fraction] = Field((0.667, 0.964), description="interval of times t of the steps")
    stride: float = Field(0.1, gt=0, le=1, description="share of t_range that a step covers")
    extra: Ends = Field((0.1, 0.25), description="k of (1 + k) r(desired) - r(undesired) at both ends of t_range")
    extra_inverted: Ends | None = Field((0.3, 0.01), description="k of the inverting step; null = no such step")
    margin: float | None = Field(0.7, description="relative reward above which the gradient is 0; null = no limit")

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Interval and template."""
        found = []
        if not self.t_range[0] < self.t_range[1]:
            found.append(("recipe.t_range", f"should rise, given {list(self.t_range)}"))
        if missing := [name for name in ("{word}", "{prompt}") if name not in self.template]:
            found.append(("recipe.template", f"should contain {' and '.join(missing)}"))
        if self.extra_inverted is not None and not (self.positive or self.negative):
            says = "without control words the inverting step undoes the denoising one: set null, or positive, negative"
            found.append(("recipe.extra_inverted", says))
        return found

    def rows_per_term(self, config: Any) -> int:
        """Both steps of every noise level."""
        return self.timesteps * (1 if self.extra_inverted is None else 2)

    def terms(self, rollout: Scored, credit: Tensor) -> Terms:
        """Every sample."""
        return every_sample(rollout)

    def loss(self, terms: Terms, rollout: Scored, bench: Bench) -> ScoredLoss:
        """Samples are generated and scored without gradient, and recovered from their noised copies with it."""
        sample, count, guidance = terms.sample, len(terms), rollout.guidance
        times, step = rollout.course(sample, bench.generator)
        eps, cond = rollout.latents[sample], rollout.cond_of(sample)
        x0 = bench.unroll(eps, times, cond, guidance=guidance, step=step, last=0).detach()
        u = base.stratified_times([rollout.seeds[n] for n in sample.tolist()], self.timesteps, (0.0, 1.0)).T.flatten()
        made = direct.jumps(u, self.stride, self.t_range, self.extra, self.extra_inverted)
        copies = torch.arange(count).repeat(len(made.t) // count)
        rows, x, eps = sample[copies], x0[copies], eps[copies]
        point = Point(losses.x_at(x, eps, made.t), made.t.to(x.device), rollout.cond_of(rows), guidance)
        seen = bench.decode(direct.direct_align(x, eps, bench.velocity("policy", point), made.t, made.t_next))
        with torch.no_grad():
            clean = bench.decode(x0)
        plain = [rollout.prompts[n] for n in sample.tolist()]
        texts = [self.worded(rollout, rows, words) for words in (made.inverts, ~made.inverts)]
        media, index = torch.cat([clean, seen, seen]), torch.cat([sample, rows, rows])
        rewards, scores = bench.judged(media, index, rollout, [*plain, *texts[0], *texts[1]])
        wanted, unwanted = rewards[count:].chunk(2)
        relative = direct.relative_preference(wanted, unwanted, made.k.to(rewards)).view(-1, count)
        known = scores.values.isfinite()[count:].view(2, -1, count).all(0)
        value = losses.reward_backprop(relative, known, self.margin).value
        return ScoredLoss(value, scores=scores.rows(0, count), media=clean.cpu())

    def worded(self, rollout: Scored, rows: Tensor, unwanted: Tensor) -> list[str]:
        """Prompts of the rows ``[R]`` with this rollout's word, the unwanted one where ``unwanted [R]``."""
        words = [
            kind[derive(rollout.seed, "word") % len(kind)] if kind else "" for kind in (self.positive, self.negative)
        ]
        return [
            self.template.replace("{word}", words[bad]).replace("{prompt}", rollout.prompts[n]) if words[bad]
            else rollout.prompts[n]
            for n, bad in zip(rows.tolist(), unwanted.tolist(), strict=True)
        ]  # fmt: skip
