"""Noisy reward guidance: the gradient of a latent reward bends the flow, without decoding on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method

if TYPE_CHECKING:
    from align.search.task import Task


class NRG(Method):
    """Flow-NRG: the velocity bent by a reward on noised latents, v - strength t / (1 - t) grad (arXiv 2501.13918)

    Needs a latent reward that was trained on noised latents; one of clean latents fails here. A reward of several
    objectives returns ``[n, K]``, and is the sum of theirs with ``weights``.
    """

    latent = True

    kind: Literal["nrg"] = Field("nrg", description="noisy reward guidance")
    particles: int = Field(1, ge=1, description="samples per prompt at a time")
    strength: float = Field(
        10.0, gt=0, description="strength of the reward in the target distribution p(x) exp(strength * reward)"
    )
    weights: tuple[float, ...] = Field(
        (),
        description="weight of each objective of a latent reward with several, whose values are [n, K]; [] = all 1",
    )
    latest: float = Field(0.98, gt=0, lt=1, description="t above which the factor t / (1 - t) stops growing")

    def search(self, task: Task) -> None:
        """Guided samples while the budget lasts."""
        cost = task.cost.sample + task.steps * task.cost.latent_reward
        for trial, count in task.rounds(cost, self.particles):
            now = task.begin(count).numbered()
            for i in range(task.steps):
                t = float(task.times[i])
                factor = min(t, self.latest) / (1 - min(t, self.latest))
                v = task.velocity(now, t) - self.strength * factor * task.latent_reward_grad(now, t, self.weights)
                now = now.moved(task.step(now.moved(now.x, v), i, trial).x)
            task.score(now)
