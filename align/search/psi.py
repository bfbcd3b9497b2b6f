"""Psi-Sampler: initial noise drawn from its posterior by MCMC, then guided particles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Weighted

if TYPE_CHECKING:
    from torch import Tensor

    from align.search.task import Task


class Psi(Weighted):
    """Psi-Sampler: preconditioned Crank-Nicolson Langevin on the noise, then SMC with gradients (arXiv 2506.01320)"""

    gradients = True

    kind: Literal["psi"] = Field("psi", description="posterior of the noise, then SMC")
    particles: int | None = Field(
        10, ge=1, description="per prompt; null = all that their share of the budget pays for"
    )
    share: float = Field(0.5, gt=0, lt=1, description="of the budget that the chains spend; half of it is burn-in")
    chains: int = Field(5, ge=1, description="of the MCMC, per prompt")
    step_size: float = Field(0.5, gt=0, description="h of the chains' proposals")
    cap: float | None = Field(
        1.0, gt=0, description="longest shift by the gradient, root mean square in standard deviations of a step"
    )

    def search(self, task: Task) -> None:
        """Chains, then one population; again while the budget lasts."""
        from align.search.budget import together
        from align.search.particles import Cloud, Plan

        valued, strengths = frozenset(range(task.steps - 1)), [self.strength] * (task.steps + 1)
        plan = Plan(strengths, valued, guided=True, resample_below=self.resample_below, cap=self.cap)
        each = together(task.plain, (task.looking._replace(network_calls=0), len(valued)))
        links = max(1, round(self.share / (1 - self.share) * each.network_calls / task.calls))  # per particle
        for number, count in task.rounds(together(each, (task.looking, links)), self.particles):
            chains = min(self.chains, links * count)
            x, names = self.posterior(task, number, chains, links * count // chains, count)
            Cloud(task, plan, x, names, tilted=True).run(number)

    def posterior(
        self, task: Task, number: int, chains: int, length: int, count: int
    ) -> tuple[Tensor, list[tuple[str, ...]]]:
        """``count`` noises per prompt, evenly from the second half of ``chains`` of ``length`` states each."""
        import torch

        x, row, _, names = task.begin(chains)
        now = self.judged(task, x, row)
        kept, labels = [now[0]], [names]
        for k in range(1, length):
            noise = task.noise(row, "chain", number, k)
            drift, root = self.drift(now), (1 - self.memory**2) ** 0.5
            tried = self.judged(task, self.memory * now[0] + root * (noise + drift), row)
            ratio = self.log_density(tried, now) - self.log_density(now, tried)
            draws = torch.stack([task.uniform("accept", number, k, c) for c in range(chains)], 1).flatten()
            moved = draws.log() < ratio
            names = [(*a, f"link {k}") if yes else a for a, yes in zip(names, moved.tolist(), strict=True)]
            where = moved.to(x.device).view(-1, *[1] * (x.ndim - 1))
            now = (
                torch.where(where, tried[0], now[0]),
                torch.where(moved, tried[1], now[1]),
                torch.where(where, tried[2], now[2]),
            )
            kept.append(now[0])
            labels.append(names)
        half = length // 2
        table = torch.stack(kept[half:], 1).unflatten(0, (task.prompts, chains)).flatten(1, 2)
        chosen = torch.linspace(0, table.shape[1] - 1, count).round().long()
        lineage = [
            labels[half + n % (length - half)][b * chains + n // (length - half)]
            for b in range(task.prompts)
            for n in chosen.tolist()
        ]
        return table[:, chosen.to(x.device)].flatten(0, 1), lineage

    @property
    def memory(self) -> float:
        """How much of a state its proposal keeps."""
        return (1 - self.step_size / 4) / (1 + self.step_size / 4)

    def judged(self, task: Task, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A state with ``strength`` times its value ``[N]`` and the gradient of that."""
        _, values, slope = task.look(x, task.times[0], row)
        return x, self.strength * values, self.strength * slope

    def drift(self, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """What the gradient adds to the noise of a proposal."""
        return self.step_size**0.5 / 2 * state[2]

    def log_density(self, to: tuple[Tensor, Tensor, Tensor], of: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Log of target(``to``) times the density of proposing ``of`` from there, ``[N]`` up to a constant."""
        import torch

        x, value, _ = to
        square = 1 - self.memory**2
        reached = (of[0] - self.memory * x - square**0.5 * self.drift(to)).double().flatten(1).square().sum(1)
        prior = x.double().flatten(1).square().sum(1)
        return value.nan_to_num(nan=-torch.inf) - (prior / 2 + reached / (2 * square)).cpu()
