"""Rollover budget forcing: children of a step are drawn one by one until one is better than all before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from align.search.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from align.search.task import Task


class State(NamedTuple):
    """One particle per prompt: latents, velocity ``[B, ...]``, value ``[B]``, names."""

    x: Tensor
    v: Tensor
    value: Tensor
    names: list[tuple[str, ...]]


class RBF(Method):
    """Rollover budget forcing: flow as SDE on a variance-preserving path, unused budget rolls over (arXiv 2503.19385)

    Each step is solved exactly with x0_hat held, so that the noise level is right at any length of step. The noise is
    the method's own: the sampler named is that of the steps it starts from.
    """

    deterministic = True

    kind: Literal["rbf"] = Field("rbf", description="rollover budget forcing")
    interpolant: Literal["vp", "linear"] = Field("vp", description="path whose SDE is sampled; linear = the flow's own")
    grid: Literal["generator", "slow_start"] = Field(
        "generator", description="times of the steps; slow_start = as published, which leaves a long last step"
    )
    diffusion: float = Field(3.0, gt=0, description="d of the diffusion coefficient g(t) = d t^2")
    first: int = Field(25, ge=1, description="initial noises judged at the first step; at most a step's share")

    def search(self, task: Task) -> None:
        """Search after search for the prompts that can pay another."""
        import torch

        from align.search.budget import Cost, together

        judged, last = together(Cost(task.calls), (task.glance, 1)), Cost(0, 1, 1)
        task.check(together(last, (judged, task.steps)))
        number = 0
        while True:
            afforded = [task.meter.affordable(judged, 2**20, last, prompt=b) for b in range(task.prompts)]
            quota = torch.tensor([count if count >= task.steps else 0 for count in afforded])
            if not bool(quota.any()):
                return
            self.descend(task, number, quota)
            number += 1

    def descend(self, task: Task, number: int, quota: Tensor) -> None:
        """From noise to scored samples with ``quota [B]`` judgements on the way; prompts with none are left out."""
        import torch

        from align import samplers
        from align.search import interpolant

        own = self.grid == "generator"
        times = task.times.tolist() if own else interpolant.slow_start(task.steps, self.interpolant)
        levels = interpolant.levels(times, self.interpolant, self.diffusion)

        def start(row: Tensor, k: int) -> Tensor:
            return task.noise(row, "start", number=[number * self.first + k] * len(row))

        allowed = (quota // task.steps).clamp_max(self.first)
        blank = State(start(task.rows(1), 0), start(task.rows(1), 0), torch.zeros(task.prompts), [()] * task.prompts)
        never = torch.full((task.prompts,), torch.inf, dtype=torch.float64)
        now, used = self.draw(task, start, times[0], allowed, never, blank, "noise")
        height, left, saved = now.value, quota - used, torch.zeros_like(quota)
        for i in range(task.steps - 1):
            more = task.steps - 1 - i
            allowed = torch.minimum(saved + (left - saved) // more, left - (more - 1)).clamp_min(0)

            def child(row: Tensor, k: int, i: int = i, now: State = now) -> Tensor:
                noise = task.noise(row, "child", number, i, number=[k] * len(row))
                x, v, level = now.x[row], now.v[row], levels[i]
                return samplers.step("cps", x, v, times[i], times[i + 1], level=level, noise=noise).x

            now, used = self.draw(task, child, times[i + 1], allowed, height, now, f"step {i}: child")
            height, left, saved = torch.fmax(height, now.value), left - used, allowed - used
        row = quota.nonzero().flatten().to(now.x.device)
        finished = samplers.step("ode", now.x[row], now.v[row], times[-2], times[-1]).x
        task.score(finished, row, [now.names[b] for b in row.tolist()])

    def draw(
        self,
        task: Task,
        child: Callable[[Tensor, int], Tensor],
        t: float,
        allowed: Tensor,
        height: Tensor,
        before: State,
        label: str,
    ) -> tuple[State, Tensor]:
        """Children at time ``t``: the first above ``height [B]``, or the best of ``allowed [B]``; and their number."""
        import torch

        x, v, names = before.x.clone(), before.v.clone(), list(before.names)
        value = torch.full((task.prompts,), -torch.inf, dtype=torch.float64)
        spent, waiting = torch.zeros_like(allowed), allowed > 0
        while bool(waiting.any()):
            row, k = waiting.nonzero().flatten(), int(spent.max())
            there = row.to(x.device)
            tried = child(there, k)
            speed = task.velocity(tried, t, there)
            found = task.value(tried, speed, t, there).nan_to_num(nan=-torch.inf)
            up = (found > value[row]) | (k == 0)
            better, source = row[up], up.to(x.device)
            value[better] = found[up]
            x[better.to(x.device)], v[better.to(x.device)] = tried[source], speed[source]
            for b in better.tolist():
                names[b] = (*before.names[b], f"{label} {k}")
            spent[row] += 1
            waiting[row] = (found <= height[row]) & (spent[row] < allowed[row])
        return State(x, v, value, names), spent
