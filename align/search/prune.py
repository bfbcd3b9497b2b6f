"""Prune by value: neighbours of one noise set out together, the less promising are dropped early on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from align.search.task import Task


class Prune(Method):
    """Latent-reward pruning: draws by value, each particle once, at a few early steps, then the best alone (LatSearch)

    Made for a latent reward, which needs no decode; without one ``x0_hat`` is decoded and judged by the reward. Nothing
    is copied, so any sampler will do.
    """

    kind: Literal["prune"] = Field("prune", description="pruning by the value of unfinished samples")
    particles: int = Field(6, ge=1, description="a noise and its neighbours, per prompt at a time")
    spread: float = Field(0.1, gt=0, le=1, description="amplitude of the fresh noise in a neighbour")
    at: list[float] = Field([0.2, 0.3, 0.4], min_length=1, description="shares of the steps where particles are judged")
    temperature: float = Field(1.0, gt=0, description="a particle is drawn with probability ~ exp(value / temperature)")

    def search(self, task: Task) -> None:
        """Family after family for the prompts that can pay for one; what dropping saves pays for more of them."""
        from align.search.budget import together

        steps = sorted({min(int(share * task.steps), task.steps - 1) for share in self.at})
        cost, number = together(task.plain, (task.glance, len(steps))), 0
        task.check(cost)
        while any(counts := [task.meter.affordable(cost, self.particles, prompt=b) for b in range(task.prompts)]):
            self.follow(task, steps, number, counts)
            number += 1

    def follow(self, task: Task, steps: list[int], number: int, counts: list[int]) -> None:
        """From ``counts [B]`` noises to the one sample that is left of each prompt; one with none is left out."""
        import torch

        parent, _, _, names = task.begin(1)
        row = task.rows(1).repeat_interleave(torch.tensor(counts, device=parent.device))
        ids = [k for count in counts for k in range(count)]
        near = (1 - self.spread**2) ** 0.5 * parent[row] + self.spread * task.noise(row, "near", number)
        first = torch.tensor(ids, device=row.device).view(-1, *[1] * (near.ndim - 1)) == 0
        x = torch.where(first, parent[row], near)
        lineage = [(*names[b], f"neighbour {k}") if k else names[b] for b, k in zip(row.tolist(), ids, strict=True)]
        total, here = torch.zeros(len(row), dtype=torch.float64), 0
        at: tuple[int, Tensor, Tensor] = (0, x, x)

        def remember(i: int, x: Tensor, v: Tensor) -> None:
            nonlocal at
            at = (i, x, v)

        for i in steps:
            x = task.sample(x, row, "sample", number, number=ids, first=here, last=i + 1, on_step=remember)
            here = i + 1
            values = task.value(at[1], at[2], task.times[i], row)
            total, kept = self.survivors(task, values, total, row, number, i, i == steps[-1])
            there = kept.to(x.device)
            x, row, total = x[there], row[there], total[kept]
            ids, lineage = [ids[n] for n in kept.tolist()], [lineage[n] for n in kept.tolist()]
        if here < task.steps:
            x = task.sample(x, row, "sample", number, number=ids, first=here)
        task.score(x, row, lineage)

    def survivors(
        self, task: Task, values: Tensor, total: Tensor, row: Tensor, number: int, i: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Weights summed over the judgements so far, and the rows that go on: at the last step one of each prompt."""
        import torch

        from align.search.particles import weights

        total, kept, draws = total.clone(), [], task.uniform("prune", number, i).tolist()
        for b in range(task.prompts):
            mine = (row.cpu() == b).nonzero().flatten()
            if not len(mine):
                continue
            share = weights((values[mine] / self.temperature).nan_to_num(nan=-torch.inf)[None])[0]
            total[mine] += share
            if last:
                kept.append(mine[total[mine].argmax()][None])
                continue
            generator = torch.Generator().manual_seed(int(draws[b] * 2**53))
            kept.append(mine[torch.multinomial(share, len(mine), replacement=True, generator=generator).unique()])
        return total, torch.cat(kept)
