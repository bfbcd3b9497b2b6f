"""Diffusion latent beam search: several children per step, judged by looking ahead, the best go on."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from align.search.budget import Cost
    from align.search.task import Task


class Beam(Method):
    """Diffusion latent beam search with lookahead (arXiv 2501.19252)

    Children of a beam share the mean of the step and differ in its noise. A child's first step of lookahead is also
    its next step's network call. Children of the last stochastic step are finished and judged as samples.
    """

    stochastic = True
    default_sampler = "ddim"

    kind: Literal["beam"] = Field("beam", description="diffusion latent beam search")
    beams: int = Field(4, ge=1, description="kept per prompt at every step")
    children: int = Field(2, ge=2, description="of each beam at every step, at most")
    lookahead: int = Field(1, ge=1, description="ODE steps from a child to the sample it is judged by; 1 = x0_hat")

    def search(self, task: Task) -> None:
        """One beam search after another while the budget lasts; with fewer children where it pays for fewer."""
        sizes = [self.model_copy(update={"children": count}) for count in range(self.children, 1, -1)]
        fits = next((one for one in sizes if task.meter.affordable(one.cost(task), 1)), sizes[-1])
        for number, count in task.rounds(fits.cost(task), self.beams):
            fits.descend(task, number, count)

    def cost(self, task: Task) -> Cost:
        """Of one beam."""
        from align.search.budget import Cost, together

        judged = together(Cost(self.lookahead * task.calls), (task.glance, 1))
        finished = Cost(task.calls, 1, 1)
        return together(Cost(task.calls), (judged, self.children * (task.steps - 2)), (finished, self.children))

    def descend(self, task: Task, number: int, count: int) -> None:
        """From noise to scored samples with ``count`` beams per prompt."""
        x, row, _, lineage = task.begin(count)
        v = task.velocity(x, task.times[0], row)
        wide = task.rows(count * self.children)
        for i in range(task.steps - 1):
            x, v = (z.repeat_interleave(self.children, 0) for z in (x, v))
            x = task.step(x, v, i, wide, number).x
            v = task.velocity(x, task.times[i + 1], wide)
            lineage = [(*line, f"step {i}: child {k}") for line in lineage for k in range(self.children)]
            if i == task.steps - 2:
                task.score(task.step(x, v, i + 1, wide).x, wide, lineage)
                return
            kept = self.choose(task, self.values(task, x, v, i + 1, wide), count, i, number)
            there = kept.to(x.device)
            x, v, lineage = x[there], v[there], [lineage[n] for n in kept.tolist()]

    def values(self, task: Task, x: Tensor, v: Tensor, i: int, row: Tensor) -> Tensor:
        """Rewards ``[N]`` of what ``lookahead`` ODE steps make of ``x`` before step ``i``."""
        import torch

        from align import samplers

        times = torch.linspace(float(task.times[i]), 0.0, self.lookahead + 1, dtype=task.times.dtype)
        for t, t_next in pairwise(times[:-1]):
            x = samplers.step("ode", x, v, t, t_next).x
            v = task.velocity(x, t_next, row)
        return task.value(x, v, times[-2], row)

    def choose(self, task: Task, values: Tensor, count: int, i: int, number: int) -> Tensor:
        """Rows ``[B * count]`` of the best children of each prompt."""
        import torch

        table = values.nan_to_num(nan=-torch.inf).view(task.prompts, -1)
        chosen = table.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return (chosen + table.shape[1] * torch.arange(task.prompts)[:, None]).flatten()
