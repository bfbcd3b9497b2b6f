"""EvoSearch: generations bred from the best samples, first from their noise, then from intermediate states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method
from align.search.noises import renew
from align.search.particles import Particles, cat
from align.search.rows import by_prompt, rows_of, top
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.task import Task
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Generation:
    """Scored samples with their values, and a map from step to the same particles before it, with their velocity."""

    samples: Particles
    states: dict[int, Particles]

    def __getitem__(self, rows: Tensor) -> Generation:
        return Generation(self.samples[rows], {i: state[rows] for i, state in self.states.items()})

    def joined(self, other: Generation) -> Generation:
        """This one and the other behind it in each prompt, with the states that the other has."""
        states = {i: cat([self.states[i], state]).by_prompt() for i, state in other.states.items()}
        return Generation(cat([self.samples, other.samples]).by_prompt(), states)


class Evo(Method):
    """EvoSearch: evolution at several sampling steps; elites survive, children are mutated (arXiv 2505.17618)

    A mutation renews a part of the parent's noise and keeps its amount, at every step. Parents are chosen by
    tournament.
    """

    kind: Literal["evo"] = Field("evo", description="evolutionary search")
    population: int | None = Field(
        None, ge=2, description="samples per generation; null = as many as the budget allows"
    )
    schedule: list[float] = Field(
        [0.0, 0.4, 0.6, 0.8], description="points at which generations are bred, as shares of the sampling steps"
    )
    elites: float = Field(0.2, ge=0, lt=1, description="share of a generation that survives unchanged")
    mutation: float = Field(0.2, gt=0, le=1, description="amplitude of the renewed part of the noise")
    tournament: float = Field(
        0.9, gt=0, le=1, description="tournament size as a share of the generation; its best sample becomes a parent"
    )

    def search(self, task: Task) -> None:
        """One evolution after another while the budget lasts."""
        steps = sorted({min(int(share * task.steps), task.steps - 1) for share in self.schedule})
        cost = sum((task.cost.sample_from(i) for i in steps), start=task.cost.sample)
        for trial, count in task.rounds(cost, self.population):
            self.evolve(task, steps, trial, count)

    def evolve(self, task: Task, steps: list[int], trial: int, count: int) -> None:
        """A generation from noise, then one bred at each of ``steps``."""
        now = self.grow(task, task.begin(count).numbered(), steps, trial, 0)
        elders = min(round(self.elites * count), count - 1)
        for i in steps:
            values, t = now.samples.value, task.times[i]
            parents = now.states[i][self.parents(task, values, count, i, trial)].numbered()
            eps, noise = parents.x + (1 - t) * parents.v, task.noise(parents, "mutation", trial, i)
            mutants = parents.moved(renew(parents.x, eps, noise, t, self.mutation))
            bred = self.grow(task, mutants.named(f"step {i}: mutant", mutants.number), steps, trial, i)
            now = now[top(values, task.prompts, elders)].joined(bred)

    def grow(self, task: Task, particles: Particles, steps: list[int], trial: int, i: int) -> Generation:
        """Samples of particles before step ``i``, scored, with their states on the way."""
        states: dict[int, Particles] = {}

        def remember(step: int, now: Particles) -> None:
            if step in steps:
                states[step] = now

        samples = task.sample(particles, "sample", trial, i, first=i, on_step=remember)
        return Generation(samples.valued(task.score(samples)), states)

    def parents(self, task: Task, values: Tensor, count: int, i: int, trial: int) -> Tensor:
        """Rows ``[B * count]``: each the best of a random part of its prompt's generation, values ``[B * K]``."""
        table = by_prompt(values, task.prompts)
        size = max(1, round(self.tournament * table.shape[1]))
        chosen = []
        for mine, random in zip(table, task.random("tournament", trial, i), strict=True):
            entered = torch.rand(count, len(mine), generator=random).argsort(1)[:, :size]
            chosen.append(entered.gather(1, mine[entered].argmax(1, keepdim=True)).flatten())
        return rows_of(torch.stack(chosen), table.shape[1])
