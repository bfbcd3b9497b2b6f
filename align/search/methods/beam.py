"""Diffusion latent beam search: several children per step, scored by lookahead; the best continue."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.maths import samplers
from align.search.base import Method
from align.search.budget import Cost
from align.search.particles import Particles
from align.search.rows import top
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.task import Task
else:
    torch = lazy("torch")


class Beam(Method):
    """Diffusion latent beam search with lookahead (arXiv 2501.19252)

    Children of a beam share the mean of the step and differ in its noise. A child's first step of lookahead is also
    its next step's network call. Children of the last stochastic step are finished and judged as samples.
    """

    stochastic = True
    default_sampler = "ddim"

    kind: Literal["beam"] = Field("beam", description="diffusion latent beam search")
    beams: int = Field(4, ge=1, description="beams kept per prompt at every step")
    children: int = Field(2, ge=2, description="maximum number of children per beam at every step")
    lookahead: int = Field(1, ge=1, description="ODE steps from a child to the sample that is scored; 1 = x0_hat")

    def search(self, task: Task) -> None:
        """One beam search after another while the budget lasts; with fewer children where it pays for fewer."""
        sizes = [self.model_copy(update={"children": count}) for count in range(self.children, 1, -1)]
        fits = next((one for one in sizes if task.meter.affordable(one.cost(task), 1)), sizes[-1])
        for trial, count in task.rounds(fits.cost(task), self.beams):
            fits.descend(task, trial, count)

    def cost(self, task: Task) -> Cost:
        """Cost of one beam."""
        velocity = task.cost.velocity
        judged = self.lookahead * velocity + task.cost.value
        finished = velocity + task.cost.score
        return velocity + self.children * (task.steps - 2) * judged + self.children * finished

    def descend(self, task: Task, trial: int, count: int) -> None:
        """From noise to scored samples with ``count`` beams per prompt."""
        beams = task.begin(count)
        beams = beams.moved(beams.x, task.velocity(beams, task.times[0]))
        for i in range(task.steps - 1):
            children = beams.repeat(self.children)
            children = children.named(f"step {i}: child", children.number % self.children)
            children = children.moved(task.step(children, i, trial).x)
            children = children.moved(children.x, task.velocity(children, task.times[i + 1]))
            if i == task.steps - 2:
                task.score(children.moved(task.step(children, i + 1).x))
                return
            beams = children[self.choose(task, self.values(task, children, i + 1), count, i, trial)]

    def values(self, task: Task, children: Particles, i: int) -> Tensor:
        """Rewards ``[N]`` of the samples that ``lookahead`` ODE steps make of children before step ``i``."""
        times = torch.linspace(float(task.times[i]), 0.0, self.lookahead + 1, dtype=task.times.dtype)
        for t, t_next in pairwise(times[:-1]):
            ahead = children.moved(samplers.step("ode", children.x, children.v, t, t_next).x)
            children = ahead.moved(ahead.x, task.velocity(ahead, t_next))
        return task.value(children, times[-2])

    def choose(self, task: Task, values: Tensor, count: int, i: int, trial: int) -> Tensor:
        """Rows ``[B * count]`` of the best children of each prompt."""
        return top(values, task.prompts, count)
