"""Latent-reward pruning: neighbouring noises start together; the less promising are dropped at early steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method
from align.search.smc import weights
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.particles import Particles
    from align.search.task import Task
else:
    torch = lazy("torch")


class Prune(Method):
    """Latent-reward pruning: particles sampled by value without replacement at early steps, then the best (LatSearch)

    Made for a latent reward, which needs no decode; without one ``x0_hat`` is decoded and judged by the reward. Nothing
    is copied, so any sampler will do.
    """

    kind: Literal["prune"] = Field("prune", description="pruning by the value of unfinished samples")
    particles: int = Field(6, ge=1, description="particles per prompt at a time: a noise and its neighbours")
    spread: float = Field(0.1, gt=0, le=1, description="amplitude of the fresh noise in a neighbour")
    at: list[float] = Field(
        [0.2, 0.3, 0.4],
        min_length=1,
        description="points at which particles are scored, as shares of the sampling steps",
    )
    temperature: float = Field(
        1.0, gt=0, description="temperature of the sampling, with probability ~ exp(value / temperature)"
    )

    def search(self, task: Task) -> None:
        """Family after family for the prompts that can pay for one; what dropping saves pays for more of them."""
        steps = sorted({min(int(share * task.steps), task.steps - 1) for share in self.at})
        cost, trial = task.cost.sample + len(steps) * task.cost.value, 0
        task.check(cost)
        while any(counts := [task.meter.affordable(cost, self.particles, prompt=b) for b in range(task.prompts)]):
            self.follow(task, steps, trial, torch.tensor(counts))
            trial += 1

    def follow(self, task: Task, steps: list[int], trial: int, counts: Tensor) -> None:
        """From ``counts [B]`` noises to the one sample that is left of each prompt; one with none is left out."""
        alive = self.family(task, trial, counts)
        total, here = torch.zeros(len(alive), dtype=torch.float64), 0
        for i in steps:
            alive = task.sample_and_value(alive, "sample", trial, first=here, last=i + 1)
            share = self.shares(task, alive)
            total += share
            drawn = self.drawn(task, alive, share, trial, i) if i < steps[-1] else self.heaviest(task, alive, total)
            alive, total, here = alive[drawn], total[drawn], i + 1
        task.score(task.sample(alive, "sample", trial, first=here))

    def family(self, task: Task, trial: int, counts: Tensor) -> Particles:
        """A noise and its neighbours, ``counts [B]`` of each prompt."""
        parents = task.begin(1)[torch.arange(task.prompts).repeat_interleave(counts)].numbered()
        near = (1 - self.spread**2) ** 0.5 * parents.x + self.spread * task.noise(parents, "near", trial)
        return parents.where(parents.number == 0, parents.moved(near).named("neighbour", parents.number))

    def shares(self, task: Task, alive: Particles) -> Tensor:
        """Sampling probabilities ``[N]``, which add up to 1 in each prompt."""
        scaled = (alive.value / self.temperature).nan_to_num(nan=-torch.inf)
        share = torch.zeros_like(scaled)
        for mine in self.by_prompt(task, alive):
            share[mine] = weights(scaled[mine][None])[0]
        return share

    def drawn(self, task: Task, alive: Particles, share: Tensor, trial: int, i: int) -> Tensor:
        """Rows that are chosen at least once if a row is sampled for every particle of the prompt."""
        kept, random = [], task.random("prune", trial, i)
        for b, mine in enumerate(self.by_prompt(task, alive)):
            if len(mine):
                draws = torch.multinomial(share[mine], len(mine), replacement=True, generator=random[b])
                kept.append(mine[draws.unique()])
        return torch.cat(kept)

    def heaviest(self, task: Task, alive: Particles, total: Tensor) -> Tensor:
        """The row of each prompt with the highest ``total [N]``."""
        return torch.stack([mine[total[mine].argmax()] for mine in self.by_prompt(task, alive) if len(mine)])

    def by_prompt(self, task: Task, alive: Particles) -> list[Tensor]:
        """Rows of each prompt's particles, B of them, some with none."""
        row = alive.row.cpu()
        return [(row == b).nonzero().flatten() for b in range(task.prompts)]
