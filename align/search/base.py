"""Interface of a search method: settings and :meth:`Method.search`, which spends a budget on one batch of prompts.

A file of this folder with a class that has ``kind: Literal["name"]`` is a method. Its module imports
torch through :mod:`alignflow.lazy`, so that settings are read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from align.config.sampling import LEVELS, Sampler
from alignflow.kinds import listing, problems_at
from alignflow.strict import Strict

if TYPE_CHECKING:
    from align.search.task import Task

NOISY = [kind for kind, level in LEVELS.items() if level is not None]


class Method(Strict):
    """Base of every method. ``alignflow recipes`` prints the first line of a subclass's docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    stochastic: ClassVar[bool] = False
    """Whether it needs a sampler whose steps add noise: copies of a particle would stay equal without."""
    deterministic: ClassVar[bool] = False
    """Whether it needs a sampler without noise."""
    gradients: ClassVar[bool] = False
    """Whether it follows the reward's gradient."""
    latent: ClassVar[bool] = False
    """Whether it needs a latent reward."""
    amortised: ClassVar[bool] = False
    """Whether the prompts of a batch learn from each other, so that results depend on which are searched together."""
    default_sampler: ClassVar[str] = "ode"
    """Kind of sampler where the settings name none."""

    kind: str
    sampler: Sampler = Field(Sampler(), description="sampler")

    @model_validator(mode="before")
    @classmethod
    def _kind_of_sampler(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        sampler = data.get("sampler") or {}
        if isinstance(sampler, dict):
            if cls.stochastic and sampler.get("steps") == 1:
                raise problems_at([("sampler.steps", f"1, but {cls._needs_noise()}")])
            sampler = {"kind": cls.default_sampler, **sampler}
        return {**data, "sampler": sampler}

    @model_validator(mode="after")
    def _sampler_fits(self) -> Self:
        problems = []
        if self.stochastic and (not self.sampler.stochastic or self.sampler.steps < 2):
            problems.append(("sampler.kind", f"{self.sampler.kind}, but {self._needs_noise()}"))
        if self.deterministic and self.sampler.kind != "ode":
            problems.append(("sampler.kind", f"{self.sampler.kind}, but {self.__class__.__name__} needs ode steps"))
        if self.sampler.window.strategy != "all":
            problems.append(("sampler.window", "is for training; a search takes every step alike"))
        if problems:
            raise problems_at(problems)
        return self

    def without_gradient(self, reward: str) -> str:
        """Message for a method with :attr:`gradients` and a reward without: the reason, and what to use instead."""
        return (
            f"{self.kind} follows the gradient of the reward, and {reward!r} has none; take a reward that has one "
            "(clip, pick_score, yes_probability; alignflow recipes lists them), or a method without gradients: "
            "best_of_n, zero_order, fk, beam, rbf, evo"
        )

    def wrong_latent(self, given: bool) -> str | None:
        """The reason why the method cannot work with a latent reward (``given``), or without; None if it can."""
        if self.latent and not given:
            return (
                f"{self.kind} needs a latent reward, (x_t [n, ...], t [n], prompts) -> [n] with gradient to x_t: name "
                "one under latent_reward as package.module:name, or pass it to search(..., latent_reward=...)"
            )
        if self.gradients and given:
            return f"{self.kind} follows the gradient of the reward itself; leave latent_reward out"
        return None

    @classmethod
    def _needs_noise(cls) -> str:
        return (
            f"{cls.__name__} needs noise between its steps, or copies of a particle stay equal: "
            f"two steps or more of {listing(NOISY)}. One-step generators are searched by best_of_n, zero_order, "
            "trust_region and reno"
        )

    def search(self, task: Task) -> None:
        """Spend the task's budget; every finished sample goes through ``task.score``, which remembers the best.

        It may end by raising :class:`~align.search.budget.BudgetSpent`.
        """
        raise NotImplementedError


class Weighted(Method):
    """Settings shared by the methods with weighted particles (:mod:`align.search.smc`)."""

    stochastic = True
    default_sampler = "ddim"

    particles: int | None = Field(
        4, ge=1, description="particles per prompt at a time; null = as many as the budget allows"
    )
    strength: float = Field(
        10.0, gt=0, description="strength of the reward in the target distribution p(x) exp(strength * reward)"
    )
    resample_below: float = Field(
        0.5,
        gt=0,
        le=1,
        description="resample when the effective sample size falls below this share of the particles; 1 = always",
    )
