"""Feynman-Kac steering: particles are scored during sampling; promising ones are copied, others are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Weighted
from align.search.smc import Cloud, Plan

if TYPE_CHECKING:
    from align.search.task import Task


class FK(Weighted):
    """FK steering: particles resampled by the value of x0_hat, potentials diff, max or sum (arXiv 2501.06848)

    Log weights accumulate where resampling is skipped, and the last potential is what the others left over, so the
    weighted particles approach ``p(x) exp(strength * reward)`` with every potential and schedule.
    """

    kind: Literal["fk"] = Field("fk", description="Feynman-Kac steering")
    potential: Literal["diff", "max", "sum"] = Field(
        "diff",
        description="resampling potential: diff = change of the value | max = highest value so far | sum = sum "
        "of the values",
    )
    every: int = Field(1, ge=1, description="steps between evaluations of the particles")
    start: float = Field(0.2, ge=0, le=1, description="first evaluation, as a share of the sampling steps")
    stop: float = Field(0.8, ge=0, le=1, description="last evaluation, as a share of the sampling steps")

    def search(self, task: Task) -> None:
        """One population after another while the budget lasts."""
        first, last = round(self.start * task.steps), min(round(self.stop * task.steps), task.steps - 2)
        valued = frozenset(range(first, last + 1, self.every))
        plan = Plan([self.strength] * (task.steps + 1), valued, self.potential, resample_below=self.resample_below)
        for trial, count in task.rounds(task.cost.sample + len(valued) * task.cost.value, self.particles):
            Cloud(task, plan, task.begin(count)).run(trial)
