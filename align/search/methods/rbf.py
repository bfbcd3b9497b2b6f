"""Rollover budget forcing: children of a step are sampled one by one until one is better than all before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.maths import samplers
from align.search import interpolant
from align.search.base import Method
from align.search.particles import Particles
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.task import Task

    Child = Callable[[Particles, int], Tensor]
else:
    torch = lazy("torch")


class RBF(Method):
    """Rollover budget forcing: SDE sampling on a variance-preserving path, unused budget rolls over (arXiv 2503.19385)

    Each step is solved exactly with x0_hat held, so that the noise level is right at any length of step. The noise is
    the method's own: the sampler named is that of the steps it starts from.
    """

    deterministic = True

    kind: Literal["rbf"] = Field("rbf", description="rollover budget forcing")
    interpolant: Literal["vp", "linear"] = Field(
        "vp", description="path of the sampled SDE: vp = variance-preserving | linear = the flow's own"
    )
    grid: Literal["generator", "slow_start"] = Field(
        "generator",
        description="time grid: generator = the scheduler's | slow_start = as published, which leaves a long last step",
    )
    diffusion: float = Field(3.0, gt=0, description="d in the diffusion coefficient g(t) = d t^2")
    first: int = Field(
        25, ge=1, description="initial noises scored at the first step; at most one step's share of the budget"
    )

    def search(self, task: Task) -> None:
        """Search after search for the prompts that can pay another."""
        judged, last = task.cost.velocity + task.cost.value, task.cost.score
        task.check(task.steps * judged + last)
        trial = 0
        while True:
            afforded = [task.meter.affordable(judged, 2**20, last, prompt=b) for b in range(task.prompts)]
            quota = torch.tensor([count if count >= task.steps else 0 for count in afforded])
            if not bool(quota.any()):
                return
            self.descend(task, trial, quota)
            trial += 1

    def descend(self, task: Task, trial: int, quota: Tensor) -> None:
        """From noise to scored samples with ``quota [B]`` judgements on the way; prompts with none are left out."""
        own = self.grid == "generator"
        times = task.times.tolist() if own else interpolant.slow_start(task.steps, self.interpolant)
        levels = interpolant.levels(times, self.interpolant, self.diffusion)

        def start(parents: Particles, k: int) -> Tensor:
            return task.noise(parents.numbered(trial * self.first + k), "start")

        blank = task.begin(1)
        blank = replace(blank.moved(blank.x, blank.x), lineage=((),) * task.prompts)
        allowed = (quota // task.steps).clamp_max(self.first)
        never = torch.full((task.prompts,), torch.inf, dtype=torch.float64)
        now, used = self.draw(task, start, times[0], allowed, never, blank, "noise")
        best_so_far, left, saved = now.value, quota - used, torch.zeros_like(quota)
        for i in range(task.steps - 1):
            more = task.steps - 1 - i
            allowed = torch.minimum(saved + (left - saved) // more, left - (more - 1)).clamp_min(0)

            def child(parents: Particles, k: int, i: int = i) -> Tensor:
                noise = task.noise(parents.numbered(k), "child", trial, i)
                x, v, level = parents.x, parents.v, levels[i]
                return samplers.step("cps", x, v, times[i], times[i + 1], noise_level=level, noise=noise).x

            now, used = self.draw(task, child, times[i + 1], allowed, best_so_far, now, f"step {i}: child")
            best_so_far, left, saved = torch.fmax(best_so_far, now.value), left - used, allowed - used
        ends = now[quota.nonzero().flatten()]
        task.score(ends.moved(samplers.step("ode", ends.x, ends.v, times[-2], times[-1]).x))

    def draw(
        self, task: Task, child: Child, t: float, allowed: Tensor, best_so_far: Tensor, parents: Particles, label: str
    ) -> tuple[Particles, Tensor]:
        """Children of B parents at time ``t``, with their values, and the number of samples ``[B]``.

        Of each prompt the first above ``best_so_far [B]``, or the best of ``allowed [B]``.
        """
        found = parents.valued(torch.full((task.prompts,), -torch.inf, dtype=torch.float64))
        drawn, waiting = torch.zeros_like(allowed), allowed > 0
        while bool(waiting.any()):
            rows, k = waiting.nonzero().flatten(), int(drawn.max())
            mine = parents[rows]
            tried = mine.moved(child(mine, k)).named(f"{label} {k}")
            tried = tried.moved(tried.x, task.velocity(tried, t))
            tried = tried.valued(task.value(tried, t).nan_to_num(nan=-torch.inf))
            better = (tried.value > found.value[rows]) | (k == 0)
            found = found.put(rows[better], tried[better])
            drawn[rows] += 1
            waiting[rows] = (tried.value <= best_so_far[rows]) & (drawn[rows] < allowed[rows])
        return found, drawn
