"""Training-free guidance, of which DPS, FreeDoM, MPGD and universal guidance are settings: gradients bend the path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from align.search.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from align.search.budget import Cost
    from align.search.task import Task

PRESETS: dict[str, dict[str, Any]] = {
    "dps": {"through": 1.0, "direct": 0.0, "recur": 1},
    "freedom": {"through": 1.0, "direct": 0.0, "recur": 2},
    "mpgd": {"through": 0.0, "direct": 1.0, "recur": 1},
    "universal": {"through": 1.0, "direct": 1.0, "recur": 2, "iterate": 4},
}
"""Which gradients each published method takes (TFG, arXiv 2409.15761, shows them to be one)."""


class Guidance(Method):
    """Training-free guidance by the reward's gradient: DPS, FreeDoM, MPGD, universal (arXiv 2409.15761)

    ``through`` follows the gradient to x_t through the network, ``direct`` the one to x0_hat. By score, the reward
    times ``strength`` is added to the log-density: ``v - strength t / (1 - t) grad``, exact for a linear reward of
    Gaussian data. By rms, the change is as large as ``strength`` times the velocity.
    """

    gradients = True

    kind: Literal["guidance"] = Field("guidance", description="training-free guidance")
    preset: Literal["dps", "freedom", "mpgd", "universal"] | None = Field(
        None, description="sets through, direct, recur and iterate as that method has them, where they are not given"
    )
    particles: int = Field(1, ge=1, description="samples per prompt at a time")
    strength: float = Field(0.2, gt=0, description="of the reward: see scale")
    scale: Literal["score", "rms"] = Field("rms", description="score = as a density | rms = as a share of the velocity")
    through: float = Field(1.0, ge=0, description="share of the gradient through the network")
    direct: float = Field(0.0, ge=0, description="share of the gradient to x0_hat alone")
    iterate: int = Field(1, ge=1, description="steps of the direct gradient at each step")
    recur: int = Field(1, ge=1, description="times a step is taken, noised back in between (time travel)")
    smooth: float = Field(0.0, ge=0, description="standard deviation of noise on x0_hat before the direct gradient")
    latest: float = Field(0.98, gt=0, le=1, description="no guidance above this t, where x0_hat says nothing yet")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        return {**PRESETS.get(str(data.get("preset")), {}), **data} if isinstance(data, dict) else data

    def search(self, task: Task) -> None:
        """Guided samples while the budget lasts."""
        for number, count in task.rounds(self.cost(task), self.particles):
            self.draw(task, number, count)

    def cost(self, task: Task) -> Cost:
        """Of one guided sample."""
        from align.search.budget import Cost, together

        guided = sum(float(t) <= self.latest for t in task.times[:-1]) * self.recur
        turn = task.looking if self.through else Cost(task.calls)
        plain = Cost((task.steps - guided // self.recur) * task.calls, 1, 1)
        return together(plain, (turn, guided), (Cost(0, 1, 1), guided * self.iterate if self.direct else 0))

    def draw(self, task: Task, number: int, count: int) -> None:
        """``count`` samples per prompt."""
        from align.search.noises import add_noise

        x, row, _, lineage = task.begin(count)
        for i in range(task.steps):
            t, t_next = float(task.times[i]), float(task.times[i + 1])
            if t > self.latest:
                x = task.step(x, task.velocity(x, t, row), i, row, number, 0).x
                continue
            for turn in range(self.recur):
                v = self.guided(task, x, t, row, number, i, turn)
                later = task.step(x, v, i, row, number, turn).x
                if turn < self.recur - 1:
                    x = add_noise(later, task.noise(row, "back", number, i, turn), t_next, t)
            x = later
        task.score(x, row, lineage)

    def guided(self, task: Task, x: Tensor, t: float, row: Tensor, number: int, i: int, turn: int) -> Tensor:
        """The velocity, bent."""
        from align.losses import x0_from
        from align.search.budget import Cost

        if self.through:
            plain, _, slope = task.look(x, t, row)
            v = plain - self.through * self.sized(slope, plain, t / (1 - t) if t < 1 else 0.0)
        else:
            v = plain = task.velocity(x, t, row)
        for k in range(self.iterate if self.direct else 0):
            here = x0_from(x, v, task.times[i])
            if self.smooth:
                here = here + self.smooth * task.noise(row, "smooth", number, i, turn, k)
            slope = task.slope(here, row, lambda z, _: (z, z), Cost()).slope
            v = v - self.direct * self.sized(slope, plain, t) / self.iterate
        return v

    def sized(self, slope: Tensor, v: Tensor, factor: float) -> Tensor:
        """The change of the velocity that a gradient asks for."""
        from align.losses import column

        if self.scale == "score":
            return self.strength * factor * slope
        size, wanted = (z.flatten(1).square().mean(1).sqrt() for z in (slope, v))
        return slope * column(self.strength * wanted / size.clamp_min(1e-12), slope)
