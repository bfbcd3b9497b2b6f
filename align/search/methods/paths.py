"""Search over paths: sample part of the way, re-noise several copies, continue, keep the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method
from align.search.budget import Cost
from align.search.noises import add_noise

if TYPE_CHECKING:
    from align.search.task import Task


class Paths(Method):
    """Search over paths: copies of a path are re-noised, continued and scored (arXiv 2501.09732)

    Works with any sampler, deterministic ones too, because the copies differ by the noise they are given.
    """

    kind: Literal["paths"] = Field("paths", description="search over paths")
    paths: int = Field(2, ge=1, description="paths kept per prompt at every stage")
    copies: int = Field(4, ge=2, description="copies of every path at every stage")
    start: float = Field(0.3, ge=0, lt=1, description="first stage, as a share of the sampling steps")
    back: int = Field(1, ge=1, description="steps by which a copy is re-noised")
    forward: int = Field(3, ge=2, description="steps for which the copy is then continued; must exceed back")

    def search(self, task: Task) -> None:
        """One set of paths after another while the budget lasts."""
        stages = self.stages(task.steps)
        for trial, count in task.rounds(self.cost(task, stages), self.paths):
            self.follow(task, stages, trial, count)

    def stages(self, steps: int) -> list[tuple[int, int, int]]:
        """(step reached, step noised back to, step then taken to) of every stage; the last ends with the sample."""
        here, found = min(max(round(self.start * steps), 1), steps - 1), []
        while here < steps:
            low = max(here - self.back, 0)
            there = min(max(low + self.forward, here + 1), steps)
            found.append((here, low, there))
            here = there
        return found or [(0, 0, steps)]

    def cost(self, task: Task, stages: list[tuple[int, int, int]]) -> Cost:
        """Cost of one path."""
        moved = sum(there - low for _, low, there in stages) * task.cost.velocity
        judged = (len(stages) - 1) * task.cost.value + task.cost.score
        return stages[0][0] * task.cost.velocity + self.copies * (moved + judged)

    def follow(self, task: Task, stages: list[tuple[int, int, int]], trial: int, count: int) -> None:
        """From noise to scored samples with ``count`` paths per prompt."""
        paths = task.sample(task.begin(count).numbered(), "path", trial, last=stages[0][0])
        for here, low, there in stages:
            copies = paths.repeat(self.copies)
            copies = copies.named(f"step {here}: copy", copies.number % self.copies)
            noise = task.noise(copies, "copy", trial, here)
            t, t_back = float(task.times[here]), float(task.times[low])
            copies = copies.moved(noise if low == 0 else add_noise(copies.x, noise, t, t_back))
            if there == task.steps:
                task.score(task.sample(copies, "path", trial, here, first=low))
                return
            reached = task.sample_and_value(copies, "path", trial, here, first=low, last=there)
            paths = reached.best(task.prompts, count)
