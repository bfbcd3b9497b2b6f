"""Distribution matching distillation of a few-step sampler, weighted by reward, with a critic of its samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from align.maths import losses, matching
from align.recipes import base
from align.recipes.base import Bench, GroupRecipe, Learns, Loss, NoisedTerms, Point, Scored, Scores, Tensor


class Critic(base.Objective):
    """Model of the student's samples: flow matching on its predictions at all of its steps."""

    updates: int = Field(5, ge=1, description="optimizer steps of the critic per rollout")
    lr: float | None = Field(None, ge=0, description="learning rate of the critic; null = train.lr")
    timesteps: int = Field(5, ge=1, description="re-noised copies per sample, spread over the critic's updates")
    t_range: tuple[float, float] = Field((0.0, 1.0), description="interval of the times t of the copies")

    def terms_per_sample(self, config: Any) -> float:
        """One term per noised copy."""
        return self.timesteps

    def terms(self, rollout: Scored, credit: Tensor) -> NoisedTerms:
        """All samples, those without a score too."""
        return NoisedTerms.of(rollout, credit, credit.new_ones(len(credit)), range(self.timesteps), self.t_range)

    def predicted(self, terms: NoisedTerms, rollout: Scored) -> Tensor:
        """The clean samples that the student predicts at its steps, ``[M, ...]``."""
        return rollout.at_random_step(terms.sample, terms.slot)[2]

    def loss(self, terms: NoisedTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """Plain flow matching."""
        x0, eps = self.predicted(terms, rollout), rollout.noise(terms.sample, terms.slot)
        t = terms.t.to(x0.device)
        v = bench.velocity("critic", Point(losses.x_at(x0, eps, t), t, rollout.cond_of(terms.sample)))
        return losses.weighted_fm(v, x0, eps, t.new_ones(len(t)))


class FewStep(base.Recipe):
    """Recipes that distil the base into a student of few steps, with a critic of its samples."""

    guidance: float = Field(3.0, ge=0, description="classifier-free guidance scale of the teacher; 1 = no guidance")
    t_range: tuple[float, float] = Field((0.02, 0.98), description="interval of times t at which to compare")
    above_next: bool = Field(
        False,
        description="compare a prediction only at times above the time that its step leads to, as TDM does, so that "
        "later steps add the finer details",
    )
    critic: Critic = Field(Critic(), description="second LoRA that models the student's samples")

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Held-out samples are the student's too."""
        student, tested = getattr(config.rollout, "sampler", None), config.evaluate.sampler
        if student is None or not config.prompts.heldout or student.steps == tested.steps:
            return []
        message = f"{self.kind} trains a student of {student.steps} steps: evaluate it with as many"
        return [("evaluate.sampler.steps", message)]

    def roles(self, config: Any) -> tuple[str, ...]:
        """The teacher."""
        return ("reference",)

    def learners(self) -> dict[str, Learns]:
        """The critic is updated first, on the samples that the student is then trained on."""
        return {"critic": Learns(self.critic, updates=self.critic.updates, lr=self.critic.lr), "policy": Learns(self)}

    def terms_of(self, rollout: Scored, credit: Tensor, weight: Tensor) -> NoisedTerms:
        """Every sample once, with the noise of the slot after the critic's."""
        slots = range(self.critic.timesteps, self.critic.timesteps + 1)
        return NoisedTerms.of(rollout, credit, weight, slots, self.t_range)

    def matched(
        self, x: Tensor, t_step: Tensor, terms: NoisedTerms, rollout: Scored, bench: Bench, weight: Tensor | float = 1
    ) -> Loss:
        """Distribution matching of the student's predictions ``x [M, ...]``, which alone have a gradient.

        Args:
            t_step: ``[M]`` times at which the student made them.
        """
        t = terms.t.to(x.device)
        if self.above_next and rollout.sampler is not None:
            t = matching.above(
                t, self.t_range, matching.next_time(t_step, bench.generator.times(rollout.sampler.steps))
            )
        noisy = losses.x_at(x.detach(), rollout.noise(terms.sample, terms.slot), t)
        point = Point(noisy, t, rollout.cond_of(terms.sample), self.guidance)
        real, fake = bench.velocity("reference", point), bench.velocity("critic", replace(point, guidance=1.0))
        return losses.dmd(x, losses.x0_from(noisy, real, t), losses.x0_from(noisy, fake, t), weight)


class ReDMD(FewStep, GroupRecipe):
    """Re-DMD: distil the base into a few-step student, samples weighted by exp(beta A) (Reward Forcing, 2512.04678)

    The student is the policy under ``rollout.sampler``; ``cps`` at noise level 1 noises its predictions again, as
    published. The prediction at one step per sample is compared; its reward is that of the sample.
    """

    needs = ("trajectory", "predictions")
    kind: Literal["re_dmd"] = "re_dmd"
    beta: float = Field(2.0, ge=0, description="samples weigh exp(beta A); 0 = without the reward, plain DMD")
    advantage_clip: float = Field(2.0, gt=0, description="maximum absolute advantage A; larger ones are clipped")

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Weights exp(beta A) of the advantages A; published with fixed statistics of one reward instead."""
        return (self.beta * self.advantage(scores, group, self.advantage_clip)).exp()

    def terms(self, rollout: Scored, credit: Tensor) -> NoisedTerms:
        """Every sample that has a score."""
        return self.terms_of(rollout, credit, rollout.valid.float())

    def loss(self, terms: NoisedTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """Distribution matching at the student's prediction."""
        x_t, t_step, _ = rollout.at_random_step(terms.sample, terms.slot)
        point = Point(x_t, t_step, rollout.cond_of(terms.sample), rollout.guidance)
        x = losses.x0_from(x_t, bench.velocity("policy", point), t_step)
        return self.matched(x, t_step, terms, rollout, bench, terms.credit.to(x.device))
