"""Validated sampler settings. No torch here; :mod:`align.maths.samplers` implements the steps."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from alignflow.kinds import problems_at
from alignflow.settings import Problems, Settings
from alignflow.words import count

LEVELS: dict[str, float | None] = {
    "ode": None,
    "dpm2": None,
    "flow_sde": 0.7,
    "dance_sde": 0.3,
    "cps": 0.8,
    "ddim": 1.0,
    "exact": 0.7,
}
"""Kind of step -> default noise level; None = deterministic."""


class Window(Settings):
    """The stochastic (and trained) sampling steps; all other steps are ODE steps."""

    strategy: Literal["all", "random", "progressive"] = Field(
        "all",
        description="all = every step but the last | random = a random window per rollout (Flow-GRPO-Fast) | "
        "progressive = a window that moves forward during training (MixGRPO)",
    )
    size: int | None = Field(
        None, ge=1, description="number of stochastic steps in the window; required unless strategy is all"
    )
    start: tuple[int, int] | None = Field(
        None, description="[first, last] step at which the window may start; null = anywhere before the last step"
    )
    shift_every: int = Field(25, ge=1, description="rollouts between moves of a progressive window, by one step each")

    def problems(self, steps: int) -> Problems:
        """(setting, problem) of a window that does not fit a sampler with ``steps`` steps."""
        if self.strategy == "all":
            names = [name for name in ("size", "start") if getattr(self, name) is not None]
            return [(name, "only for strategy random or progressive") for name in names]
        if self.size is None:
            return [("size", f"is needed for strategy {self.strategy}: how many of the {steps} steps are stochastic")]
        if self.size > steps:
            return [("size", f"{self.size} stochastic steps do not fit into {steps} steps")]
        first, last = self.start or (0, steps - self.size)
        if not 0 <= first <= last <= steps - self.size:
            allowed = f"[first, last] with 0 <= first <= last <= steps - size = {steps - self.size}"
            return [("start", f"should be {allowed}, given [{first}, {last}]")]
        return []


class Sampler(Settings):
    """Settings of the sampler, which turns noise into a sample."""

    renamed: ClassVar[dict[str, str]] = {"level": "noise_level"}
    per_kind: ClassVar[tuple[str, ...]] = ("noise_level", "window")
    """Settings whose meaning depends on the kind; dropped when a later file or override changes the kind."""

    kind: Literal["ode", "dpm2", "flow_sde", "dance_sde", "cps", "ddim", "exact"] = Field(
        "ode", description="solver: ode and dpm2 are deterministic; flow_sde, dance_sde, cps, ddim and exact add noise"
    )
    steps: int = Field(10, ge=1, le=10_000, description="number of sampling steps")
    noise_level: float | None = Field(
        None,
        gt=0,
        description="strength of the noise that a stochastic sampler adds; null = the default of its kind: "
        "0.7 flow_sde, 0.3 dance_sde, 0.8 cps, 1 ddim, 0.7 exact",
    )
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance scale; 1 = no guidance, one network call per step"
    )
    window: Window = Field(Window(), description="stochastic steps")

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise, and therefore have a log-probability."""
        return LEVELS[self.kind] is not None

    @property
    def stochastic_count(self) -> int:
        """Number of stochastic steps of a trajectory: the window's, or all but the last, whose noise would remain."""
        if not self.stochastic:
            return 0
        return self.steps - 1 if self.window.size is None else self.window.size

    @model_validator(mode="before")
    @classmethod
    def _default_level(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("noise_level") is None and data.get("kind") in list(LEVELS):
            return {**data, "noise_level": LEVELS[data["kind"]]}
        return data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems: Problems = [(f"window.{name}", message) for name, message in self.window.problems(self.steps)]
        if not self.stochastic and self.noise_level is not None:
            problems.append(
                ("noise_level", f"{self.kind} is deterministic; only the stochastic kinds have a noise level")
            )
        if not self.stochastic and self.window.strategy != "all":
            problems.append(("window.strategy", f"{self.kind} has no stochastic steps to choose from"))
        if self.kind in ("cps", "ddim") and self.noise_level is not None and self.noise_level > 1:
            problems.append(
                ("noise_level", f"noise levels of {self.kind} should be in (0, 1], given {self.noise_level}")
            )
        if self.stochastic and self.window.strategy == "all" and self.steps < 2:
            problems.append(("steps", "the last step adds no noise, so a stochastic sampler needs at least 2"))
        if problems:
            raise problems_at(problems)
        return self


def sampler_line(sampler: Sampler) -> str:
    """Short description of a sampler: ``10 flow_sde steps, noise level 0.7``."""
    level = f", noise level {sampler.noise_level:g}" if sampler.noise_level is not None else ""
    guidance = f", guidance {sampler.guidance:g}" if sampler.guidance != 1.0 else ""
    window = sampler.window
    stretch = f", {window.size} stochastic ({window.strategy})" if window.strategy != "all" else ""
    return f"{count(sampler.steps, f'{sampler.kind} step')}{level}{stretch}{guidance}"
