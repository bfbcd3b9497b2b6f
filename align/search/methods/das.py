"""DAS: tempered sequential Monte Carlo with proposals along the reward's gradient, corrected by importance weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Weighted
from align.search.smc import Cloud, Plan

if TYPE_CHECKING:
    from align.search.task import Task

REACHED = 0.87
"""Share of the steps after which the published schedule (gamma 0.008 at 100 steps) has full strength."""


class DAS(Weighted):
    """DAS: tempered SMC with the reward's gradient in its proposals (arXiv 2501.05803)"""

    gradients = True

    kind: Literal["das"] = Field("das", description="tempered SMC with gradient proposals")
    gamma: float | None = Field(
        None,
        gt=0,
        description="growth of the strength: min((1 + gamma)^i - 1, 1) times the full strength before step i; "
        "null = full strength after 87 % of the steps",
    )
    cap: float | None = Field(
        1.0,
        gt=0,
        description="maximum shift by the gradient: root mean square, in standard deviations of a step; null = "
        "no maximum",
    )

    def search(self, task: Task) -> None:
        """One population after another while the budget lasts."""
        strengths = [self.strength * share for share in tempers(task.steps, self.gamma)]
        valued = frozenset(range(task.steps - 1))
        plan = Plan(strengths, valued, guided=True, resample_below=self.resample_below, cap=self.cap)
        judged = task.cost.value_and_grad - task.cost.velocity
        for trial, count in task.rounds(task.cost.sample + len(valued) * judged, self.particles):
            Cloud(task, plan, task.begin(count)).run(trial)


def tempers(steps: int, gamma: float | None) -> list[float]:
    """Share of the strength before every step, from 0 to the 1 of the finished sample, ``steps + 1`` of them."""
    growth = gamma if gamma is not None else 2 ** (1 / (REACHED * steps)) - 1
    return [*(min((1 + growth) ** i - 1, 1.0) for i in range(steps)), 1.0]
