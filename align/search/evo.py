"""EvoSearch: generations bred from the best samples, first from their noise, then from their states on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from align.search.task import Task


@dataclass(frozen=True)
class Generation:
    """Scored samples: values ``[N]``, lineages, and step -> (latents, velocity) ``[N, ...]`` before it."""

    values: Tensor
    names: list[tuple[str, ...]]
    states: dict[int, tuple[Tensor, Tensor]]

    def joined(self, other: Generation, rows: Tensor) -> Generation:
        """Rows of this one and the other behind it, with the states that both have."""
        import torch

        names, there = [*self.names, *other.names], rows.to(next(iter(other.states.values()))[0].device)
        states = {
            i: (torch.cat([self.states[i][0], x])[there], torch.cat([self.states[i][1], v])[there])
            for i, (x, v) in other.states.items()
        }
        return Generation(torch.cat([self.values, other.values])[rows], [names[n] for n in rows.tolist()], states)


class Evo(Method):
    """EvoSearch: evolution at several steps of sampling, elites live on, children are mutated (arXiv 2505.17618)

    A mutation renews a part of the parent's noise and keeps its amount, at every step. Parents are drawn by tournament.
    """

    kind: Literal["evo"] = Field("evo", description="evolutionary search")
    population: int | None = Field(None, ge=2, description="samples of a generation; null = what the budget pays for")
    schedule: list[float] = Field([0.0, 0.4, 0.6, 0.8], description="shares of the steps where generations are bred")
    elites: float = Field(0.2, ge=0, lt=1, description="share of a generation that lives on unchanged")
    mutation: float = Field(0.2, gt=0, le=1, description="amplitude of the part of the noise that is renewed")
    tournament: float = Field(0.9, gt=0, le=1, description="share of a generation among which the best is a parent")

    def search(self, task: Task) -> None:
        """One evolution after another while the budget lasts."""
        from align.search.budget import together

        steps = sorted({min(int(share * task.steps), task.steps - 1) for share in self.schedule})
        later = [(task.plain._replace(network_calls=(task.steps - i) * task.calls), 1) for i in steps]
        for number, count in task.rounds(together(task.plain, *later), self.population):
            self.evolve(task, steps, number, count)

    def evolve(self, task: Task, steps: list[int], number: int, count: int) -> None:
        """A generation from noise, then one bred at each of ``steps``."""
        import torch

        from align.search.noises import renew

        x, row, _, names = task.begin(count)
        now = self.grow(task, x, row, names, steps, number, 0)
        elders = min(round(self.elites * count), count - 1)
        for i in steps:
            table = now.values.nan_to_num(nan=-torch.inf).view(task.prompts, -1)
            parents = self.parents(task, table, count, i, number)
            x, v = (z[parents.to(z.device)] for z in now.states[i])
            t = task.times[i]
            mutants = renew(x, x + (1 - t) * v, task.noise(row, "mutation", number, i), t, self.mutation)
            names = [(*now.names[p], f"step {i}: mutant {n % count}") for n, p in enumerate(parents.tolist())]
            bred = self.grow(task, mutants, row, names, steps, number, i)
            elite = table.sort(dim=1, descending=True, stable=True).indices[:, :elders]
            elite = elite + table.shape[1] * torch.arange(task.prompts)[:, None]
            young = len(now.values) + torch.arange(len(bred.values)).view(task.prompts, count)
            now = now.joined(bred, torch.cat([elite, young], 1).flatten())

    def grow(
        self,
        task: Task,
        x: Tensor,
        row: Tensor,
        names: list[tuple[str, ...]],
        steps: list[int],
        number: int,
        i: int,
    ) -> Generation:
        """Samples from ``x`` before step ``i``, scored, with their states on the way."""
        states: dict[int, tuple[Tensor, Tensor]] = {}

        def remember(at: int, x: Tensor, v: Tensor) -> None:
            if at in steps:
                states[at] = (x, v)

        latents = task.sample(x, row, "sample", number, i, first=i, on_step=remember)
        return Generation(task.score(latents, row, names), names, states)

    def parents(self, task: Task, table: Tensor, count: int, i: int, number: int) -> Tensor:
        """Rows ``[B * count]``: each the best of a random part of its prompt's generation ``table [B, K]``."""
        import torch

        held = table.shape[1]
        size = max(1, round(self.tournament * held))
        chosen = []
        for b, draw in enumerate(task.uniform("tournament", number, i).tolist()):
            generator = torch.Generator().manual_seed(int(draw * 2**53))
            entered = torch.rand(count, held, generator=generator).argsort(1)[:, :size]
            chosen.append(entered.gather(1, table[b][entered].argmax(1, keepdim=True)).flatten() + b * held)
        return torch.cat(chosen)
