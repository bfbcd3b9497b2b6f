"""A few-step editor without pairs: a judge's gradient to the pixels beside distribution matching."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.maths import direct, losses
from align.maths.seeds import derive
from align.recipes.base import Bench, NoisedTerms, Point, Scored, ScoredLoss, Tensor, torch
from align.recipes.re_dmd import Critic, FewStep
from alignflow.errors import TrainingError


class EditCritic(Critic):
    """The critic of samples that the recipe generates itself."""

    def predicted(self, terms: NoisedTerms, rollout: Scored) -> Tensor:
        """At the step where the sample leaves the sampler."""
        return rollout.seen["clean"][terms.sample]


class NPEdit(FewStep):
    """NP-Edit: a few-step editor learns from a judge's yes and from the base's distribution (arXiv 2510.14978)

    The student leaves its sampler at a random step, and its prediction there is judged and compared; ``cps`` at noise
    level 1 noises predictions again, as published. The reward is P(yes), such as ``yes_probability`` with ``source``.
    Published are two questions, here a ``geometric`` mixture, and ``schedule: {temperature: [[0, 0.1], [2000, 1]]}``.
    Any generator and differentiable reward will do, also with a student of one step.
    The published warm-up on unchanged images is left out: the student starts as the base, which edits.
    """

    needs = ("reward_gradient",)
    kind: Literal["np_edit"] = "np_edit"
    judge: float = Field(0.02, ge=0, description="weight of -log P(yes)")
    span: tuple[float, float] = Field((0.0, 1.0), description="[lowest, highest] reward, taken as P(yes) = 0 and 1")
    temperature: float = Field(1.0, ge=0, description="factor of the judge's logits in the loss; small = soft")
    matching: float = Field(1.0, ge=0, description="weight of distribution matching")
    critic: EditCritic = Field(EditCritic(), description="second LoRA that models the student's samples")

    def check(self, config: Any) -> list[tuple[str, str]]:
        """The span rises."""
        found = [] if self.span[0] < self.span[1] else [("recipe.span", f"should rise, given {list(self.span)}")]
        return found + super().check(config)

    def look(self, sample: Tensor, rollout: Scored, bench: Bench) -> dict[str, Tensor]:
        """Point at which each sample leaves the sampler: latents, time, and the clean sample predicted there."""
        times, step = rollout.course(sample, bench.generator)
        before: list[Tensor] = []
        clean: list[Tensor] = []

        def noted(i: int, x: Tensor, v: Tensor) -> Tensor:
            before.append(x)
            clean.append(losses.x0_from(x, v, times[i]))
            return step(i, x, v)

        cond = rollout.cond_of(sample)
        bench.unroll(rollout.latents[sample], times, cond, guidance=rollout.guidance, step=noted, last=0)
        chosen = [derive(rollout.seeds[n], "exit") % len(before) for n in sample.tolist()]
        places, rows = torch.tensor(chosen), torch.arange(len(chosen))
        found = {name: torch.stack(values)[places, rows] for name, values in (("x", before), ("clean", clean))}
        return {**found, "t": times[places.to(times.device)]}

    def terms(self, rollout: Scored, credit: Tensor) -> NoisedTerms:
        """Every sample, none of which has a score yet."""
        return self.terms_of(rollout, credit, credit.new_ones(len(credit)))

    def loss(self, terms: NoisedTerms, rollout: Scored, bench: Bench) -> ScoredLoss:  # type: ignore[override]
        """The judge's loss and distribution matching at the student's prediction.

        Raises:
            TrainingError: a reward that is not a probability.
        """
        sample = terms.sample
        x_t, t_step = rollout.seen["x"][sample], rollout.seen["t"][sample]
        point = Point(x_t, t_step, rollout.cond_of(sample), rollout.guidance)
        x = losses.x0_from(x_t, bench.velocity("policy", point), t_step)
        values, scores, media = bench.scored(x, sample, rollout)
        known, (low, high) = scores.values.isfinite(), self.span
        if len(wrong := scores.values[known & ((scores.values < low) | (scores.values > high))]):
            raise TrainingError(f"np_edit: reward {float(wrong[0]):g} is outside recipe.span [{low:g}, {high:g}]")
        dmd = self.matched(x, t_step, terms, rollout, bench)
        asked = direct.yes_loss((values - low) / (high - low), self.temperature) * known
        value = self.judge * asked + self.matching * dmd.value
        return ScoredLoss(value, {**dmd.metrics, "judge": asked.detach()}, scores=scores, media=media.cpu())
