"""Psi-Sampler: initial noise sampled from its posterior by MCMC, then guided particles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Weighted
from align.search.particles import Particles, cat
from align.search.rows import rows_of
from align.search.smc import Cloud, Plan
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.task import Task
else:
    torch = lazy("torch")


class Psi(Weighted):
    """Psi-Sampler: preconditioned Crank-Nicolson Langevin on the noise, then SMC with gradients (arXiv 2506.01320)"""

    gradients = True

    kind: Literal["psi"] = Field("psi", description="posterior sampling of the noise, then SMC")
    particles: int | None = Field(
        10, ge=1, description="particles per prompt; null = as many as their share of the budget allows"
    )
    share: float = Field(0.5, gt=0, lt=1, description="share of the budget spent on the chains; half of it is burn-in")
    chains: int = Field(5, ge=1, description="MCMC chains per prompt")
    step_size: float = Field(0.5, gt=0, description="step size h of the chains' proposals")
    cap: float | None = Field(
        1.0,
        gt=0,
        description="maximum shift by the gradient: root mean square, in standard deviations of a step; null = "
        "no maximum",
    )

    def search(self, task: Task) -> None:
        """Chains, then one population; again while the budget lasts."""
        valued, strengths = frozenset(range(task.steps - 1)), [self.strength] * (task.steps + 1)
        plan = Plan(strengths, valued, guided=True, resample_below=self.resample_below, cap=self.cap)
        link = task.cost.value_and_grad
        each = task.cost.sample + len(valued) * (link - task.cost.velocity)
        links = max(1, round(self.share / (1 - self.share) * each.network_calls / task.cost.calls))  # per particle
        for trial, count in task.rounds(each + links * link, self.particles):
            chains = min(self.chains, links * count)
            start = self.posterior(task, trial, chains, links * count // chains, count)
            Cloud(task, plan, start, tilted=True).run(trial)

    def posterior(self, task: Task, trial: int, chains: int, length: int, count: int) -> Particles:
        """``count`` noises per prompt, evenly from the second half of ``chains`` of ``length`` states each."""
        now = task.value_and_grad(task.begin(chains).numbered(), task.times[0])
        states = [now.moved(now.x)]
        for k in range(1, length):
            noise, root = task.noise(now, "chain", trial, k), (1 - self.kept**2) ** 0.5
            proposed = now.moved(self.kept * now.x + root * (noise + self.drift(now))).named(f"link {k}")
            proposed = task.value_and_grad(proposed, task.times[0])
            ratio = self.log_density(proposed, now) - self.log_density(now, proposed)
            accepted = task.uniform("accept", trial, k, each=chains).log() < ratio
            now = proposed.where(accepted, now)
            states.append(now.moved(now.x))
        states = states[length // 2 :]
        chosen = torch.linspace(0, chains * len(states) - 1, count).round().long()  # chain after chain
        chain, state = chosen // len(states), chosen % len(states)
        rows = rows_of(chain.expand(task.prompts, -1), chains) + len(now) * state.repeat(task.prompts)
        return cat(states)[rows]

    @property
    def kept(self) -> float:
        """Share of a state, in amplitude, that its proposal keeps."""
        return (1 - self.step_size / 4) / (1 + self.step_size / 4)

    def drift(self, state: Particles) -> Tensor:
        """Contribution of the gradient to the noise of a proposal."""
        return self.step_size**0.5 / 2 * (self.strength * state.grad)

    def log_density(self, state: Particles, proposal: Particles) -> Tensor:
        """Log of target(``state``) times the density of ``proposal`` made from it, ``[N]`` up to a constant."""
        square, x = 1 - self.kept**2, state.x
        moved = proposal.x - self.kept * x - square**0.5 * self.drift(state)
        reached = moved.double().flatten(1).square().sum(1)
        prior = x.double().flatten(1).square().sum(1)
        tilt = (self.strength * state.value).nan_to_num(nan=-torch.inf)
        return tilt - (prior / 2 + reached / (2 * square)).cpu()
