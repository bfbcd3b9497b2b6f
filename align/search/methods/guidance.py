"""Training-free guidance by the reward's gradient; settings reproduce DPS, FreeDoM, MPGD and universal guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from align.maths.losses import column, x0_from
from align.search.base import Method
from align.search.budget import Cost
from align.search.noises import add_noise

if TYPE_CHECKING:
    from torch import Tensor

    from align.search.particles import Particles
    from align.search.task import Task

PRESETS: dict[str, dict[str, Any]] = {
    "dps": {"through": 1.0, "direct": 0.0, "recur": 1},
    "freedom": {"through": 1.0, "direct": 0.0, "recur": 2},
    "mpgd": {"through": 0.0, "direct": 1.0, "recur": 1},
    "universal": {"through": 1.0, "direct": 1.0, "recur": 2, "iterate": 4},
}
"""Gradients that each published method takes (TFG, arXiv 2409.15761, shows that they are one method)."""


class Guidance(Method):
    """Training-free guidance by the reward's gradient: DPS, FreeDoM, MPGD, universal (arXiv 2409.15761)

    ``through`` follows the gradient to x_t through the network, ``direct`` the one to x0_hat. By score, the reward
    times ``strength`` is added to the log-density: ``v - strength t / (1 - t) grad``, exact for a linear reward of
    Gaussian data. By rms, the change is as large as ``strength`` times the velocity.
    """

    gradients = True

    kind: Literal["guidance"] = Field("guidance", description="training-free guidance")
    preset: Literal["dps", "freedom", "mpgd", "universal"] | None = Field(
        None,
        description="published method that sets through, direct, recur and iterate where they are not given; "
        "null = none",
    )
    particles: int = Field(1, ge=1, description="samples per prompt at a time")
    strength: float = Field(0.2, gt=0, description="guidance strength, in the units of scale")
    scale: Literal["score", "rms"] = Field(
        "rms",
        description="scale of the guidance: score = factor of the reward in the log-density | rms = size "
        "relative to the velocity",
    )
    through: float = Field(1.0, ge=0, description="weight of the gradient through the network to x_t; 0 = off")
    direct: float = Field(0.0, ge=0, description="weight of the gradient with respect to x0_hat alone; 0 = off")
    iterate: int = Field(1, ge=1, description="direct gradient steps per sampling step")
    recur: int = Field(
        1, ge=1, description="repeats of each sampling step, re-noised in between (time travel); 1 = none"
    )
    smooth: float = Field(
        0.0, ge=0, description="standard deviation of the noise added to x0_hat before the direct gradient"
    )
    latest: float = Field(0.98, gt=0, le=1, description="largest t with guidance; above it x0_hat is uninformative")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        return {**PRESETS.get(str(data.get("preset")), {}), **data} if isinstance(data, dict) else data

    def search(self, task: Task) -> None:
        """Guided samples while the budget lasts."""
        for trial, count in task.rounds(self.cost(task), self.particles):
            self.draw(task, trial, count)

    def cost(self, task: Task) -> Cost:
        """Cost of one guided sample."""
        guided = sum(float(t) <= self.latest for t in task.times[:-1])
        each = task.cost.value_and_grad if self.through else task.cost.velocity
        if self.direct:
            each += self.iterate * task.cost.score
        return task.cost.sample_from(guided) + guided * self.recur * each

    def draw(self, task: Task, trial: int, count: int) -> None:
        """``count`` samples per prompt."""
        now = task.begin(count).numbered()
        for i in range(task.steps):
            t, t_next = float(task.times[i]), float(task.times[i + 1])
            if t > self.latest:
                now = now.moved(task.step(now.moved(now.x, task.velocity(now, t)), i, trial, 0).x)
                continue
            for turn in range(self.recur):
                v = self.guided(task, now, t, trial, i, turn)
                later = task.step(now.moved(now.x, v), i, trial, turn).x
                if turn < self.recur - 1:
                    now = now.moved(add_noise(later, task.noise(now, "back", trial, i, turn), t_next, t))
            now = now.moved(later)
        task.score(now)

    def guided(self, task: Task, now: Particles, t: float, trial: int, i: int, turn: int) -> Tensor:
        """The velocity, bent."""
        if self.through:
            judged = task.value_and_grad(now, t)
            plain = judged.v
            v = plain - self.through * self.sized(judged.grad, plain, t / (1 - t) if t < 1 else 0.0)
        else:
            v = plain = task.velocity(now, t)
        for k in range(self.iterate if self.direct else 0):
            x0 = x0_from(now.x, v, task.times[i])
            if self.smooth:
                x0 = x0 + self.smooth * task.noise(now, "smooth", trial, i, turn, k)
            grad = task.reward_grad(now.moved(x0)).grad
            v = v - self.direct * self.sized(grad, plain, t) / self.iterate
        return v

    def sized(self, grad: Tensor, v: Tensor, factor: float) -> Tensor:
        """The change of the velocity that follows from a gradient."""
        if self.scale == "score":
            return self.strength * factor * grad
        size, wanted = (z.flatten(1).square().mean(1).sqrt() for z in (grad, v))
        return grad * column(self.strength * wanted / size.clamp_min(1e-12), grad)
