"""On-policy distillation: one or several teachers correct the student's own steps, beside a policy gradient."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from align.maths import losses
from align.recipes.base import Bench, Learns, Loss, Objective, Scored, Tensor
from align.recipes.grpo import GRPO, StepTerms
from alignflow.strict import Strict


class Teacher(Strict):
    """A frozen model of the same network: the base, or the base with a LoRA."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    lora: str | None = Field(None, description="LoRA file or folder of the teacher; null = the base itself")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance scale of the teacher; 1 = no guidance")
    weight: float = Field(1.0, gt=0, description="weight of the KL to this teacher")


class OPD(GRPO):
    """OPD: KL of the student's own sampling steps to those of teachers, beside a reward (DiffusionOPD, Flow-OPD)

    The KL of two steps of equal deviation is ``mean (mu - mu_teacher)^2 / (2 std^2)``, a weighted error of velocities,
    least where the student's velocity is the weighted mean of the teachers'. Teachers take the student's steps, as in
    verl-omni, each with its own guidance, so that the base with guidance can teach one without.
    """

    kind: Literal["opd"] = "opd"  # type: ignore[assignment]
    compares_group: ClassVar[bool] = False
    teachers: tuple[Teacher, ...] = Field((Teacher(guidance=3.0),), min_length=1, description="list of teachers")
    policy_gradient: float = Field(0.0, ge=0, description="weight of grpo's loss; 0 = distillation alone")

    def names(self) -> list[str]:
        """Role or learner of every teacher."""
        return ["reference" if one.lora is None else f"teacher_{n}" for n, one in enumerate(self.teachers, 1)]

    @property
    def compares_logp(self) -> bool:
        """Only the loss of grpo does."""
        return self.policy_gradient > 0

    def check(self, config: Any) -> list[tuple[str, str]]:
        """A policy gradient compares the samples of a prompt."""
        found = super().check(config)
        if self.policy_gradient and config.rollout.group < 2:
            found.append(("rollout.group", "policy_gradient needs at least 2 samples per prompt"))
        return found

    def roles(self, config: Any) -> tuple[str, ...]:
        """The base, if it is a teacher."""
        return ("reference",) if self.kl or "reference" in self.names() else ()

    def learners(self) -> dict[str, Learns]:
        """The student, and the teachers' LoRAs, which are never trained."""
        teachers = {
            name: Learns(Objective(), updates=0, init=one.lora)
            for name, one in zip(self.names(), self.teachers, strict=True)
            if one.lora is not None
        }
        return {**teachers, "policy": Learns(self)}

    def loss(self, terms: StepTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """The KL to every teacher, plus the surrogate of grpo."""
        ours = self.steps(terms, rollout, bench)
        reward = self.surrogate(terms, rollout, ours) if self.policy_gradient else None
        step = ours("policy")
        total: Tensor = step.logp.new_zeros(len(terms))
        for name, one in zip(self.names(), self.teachers, strict=True):
            taken = bench.steps(rollout, terms.sample, terms.slot, guidance=one.guidance)
            total = total + one.weight * losses.kl_mean(step.mean, taken(name).mean, step.std)
        metrics = {"teacher_kl": total.detach()}
        if reward is None:
            return Loss(total, metrics)
        return Loss(self.policy_gradient * reward.value + total, {**reward.metrics, **metrics})
