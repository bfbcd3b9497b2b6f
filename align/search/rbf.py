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
        """One search that spends all there is; at a limit in seconds, all that its pace allows."""
        from align.search.budget import Cost
        from align.search.task import together

        judged, last = together(Cost(task.calls), (task.glance, 1)), Cost(0, 1, 1)
        quota = task.meter.affordable(judged, 2**20, reserve=last)
        if quota < task.steps:
            next(task.rounds(together(last, (judged, task.steps)), 1))  # says what is missing
        self.descend(task, max(quota, task.steps))

    def descend(self, task: Task, quota: int) -> None:
        """From noise to scored samples, with ``quota`` judgements per prompt on the way."""
        import torch

        from align import samplers
        from align.search import interpolant

        own = self.grid == "generator"
        times = task.times.tolist() if own else interpolant.slow_start(task.steps, self.interpolant)
        levels = interpolant.levels(times, self.interpolant, self.diffusion)
        now, used = self.begin(task, min(self.first, quota // task.steps))
        height, saved = now.value, torch.zeros(task.prompts, dtype=torch.long)
        left = torch.full((task.prompts,), quota - used)
        for i in range(task.steps - 1):
            more = task.steps - 1 - i
            allowed = torch.minimum(saved + (left - saved) // more, left - (more - 1))

            def child(row: Tensor, k: int, i: int = i, now: State = now) -> Tensor:
                noise = task.noise(row, "child", i, number=[k] * len(row))
                x, v, level = now.x[row], now.v[row], levels[i]
                return samplers.step("cps", x, v, times[i], times[i + 1], level=level, noise=noise).x

            now, spent = self.draw(task, i, child, times[i + 1], allowed, height, now)
            height, left, saved = torch.fmax(height, now.value), left - spent, allowed - spent
        finished = samplers.step("ode", now.x, now.v, times[-2], times[-1]).x
        task.score(finished, task.rows(1), now.names)

    def begin(self, task: Task, count: int) -> tuple[State, int]:
        """The best of ``count`` noises per prompt."""
        from align.search.task import best

        x, row, _, names = task.begin(count)
        v = task.velocity(x, 1.0, row)
        values = task.value(x, v, 1.0, row)
        top = best(values, task.prompts)
        there = top.to(x.device)
        return State(x[there], v[there], values[top], [names[n] for n in top.tolist()]), count

    def draw(
        self,
        task: Task,
        i: int,
        child: Callable[[Tensor, int], Tensor],
        t: float,
        allowed: Tensor,
        height: Tensor,
        before: State,
    ) -> tuple[State, Tensor]:
        """Children at time ``t``: the first above ``height [B]``, or the best of ``allowed [B]``; and their number."""
        import torch

        x, v, names = before.x.clone(), before.v.clone(), list(before.names)
        value = torch.full((task.prompts,), -torch.inf, dtype=torch.float64)
        spent, open_ = torch.zeros_like(allowed), torch.ones(task.prompts, dtype=torch.bool)
        while bool(open_.any()):
            row, k = open_.nonzero().flatten(), int(spent.max())
            there = row.to(x.device)
            tried = child(there, k)
            speed = task.velocity(tried, t, there)
            found = task.value(tried, speed, t, there).nan_to_num(nan=-torch.inf)
            up = (found > value[row]) | (k == 0)
            value[row[up]] = found[up]
            x[there[up.to(x.device)]], v[there[up.to(x.device)]] = tried[up.to(x.device)], speed[up.to(x.device)]
            for b in row[up].tolist():
                names[b] = (*before.names[b], f"step {i}: child {k}")
            spent[row] += 1
            open_[row] = ~((found > height[row]) | (spent[row] >= allowed[row]))
        return State(x, v, value, names), spent
