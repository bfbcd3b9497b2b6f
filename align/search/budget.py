"""Budget and cost of a search: a single counter, and no operation that would exceed the budget runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from alignflow.errors import EarlyExit
from alignflow.kinds import problem_at
from alignflow.lazy import lazy
from alignflow.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

COUNTS = ("network_calls", "decodes", "reward_calls", "backward_calls")
"""Costs that are counted by samples; seconds are counted separately."""
LIMITS = ("network_calls", "decodes", "reward_calls", "seconds")
"""Costs that can be limited."""


class Budget(Settings):
    """Limits on the cost of one prompt; the first limit reached ends its search."""

    network_calls: int | None = Field(
        None, ge=1, description="network calls per prompt, counted per sample; guidance doubles them; null = no limit"
    )
    decodes: int | None = Field(None, ge=1, description="samples decoded per prompt; null = no limit")
    reward_calls: int | None = Field(None, ge=1, description="samples scored per prompt; null = no limit")
    seconds: float | None = Field(
        None,
        gt=0,
        description="wall time per prompt in seconds; prompts searched together share it equally; null = no limit",
    )

    @model_validator(mode="after")
    def _limited(self) -> Self:
        if all(getattr(self, name) is None for name in LIMITS):
            raise problem_at("", f"needs at least one of {', '.join(LIMITS)}: a search ends when one is spent")
        return self

    def __str__(self) -> str:
        given = [(name, getattr(self, name)) for name in LIMITS]
        return ", ".join(_words(name, value) for name, value in given if value is not None)


@dataclass(frozen=True)
class Cost:
    """Cost of one particle of a method. A network call counts as the generator counts it: two with guidance.

    Costs are added, subtracted and multiplied by whole numbers: ``task.cost.sample + 3 * task.cost.value``.
    """

    network_calls: int = 0
    decodes: int = 0
    reward_calls: int = 0
    backward_calls: int = 0

    def __str__(self) -> str:
        return ", ".join(_words(name, value) for name, value in self.items() if value)

    def items(self) -> Iterator[tuple[str, int]]:
        """(name, count) of everything that is counted."""
        return iter(vars(self).items())

    def __add__(self, other: Cost) -> Cost:
        mine = vars(self)
        return Cost(**{name: mine[name] + value for name, value in other.items()})

    def __sub__(self, other: Cost) -> Cost:
        return self + -1 * other

    def __mul__(self, times: int) -> Cost:
        return Cost(**{name: value * times for name, value in self.items()})

    __rmul__ = __mul__


def _words(name: str, value: float) -> str:
    words = name.replace("_", " ")
    return f"{value:.9g} {words.removesuffix('s') if value == 1 else words}"


NOTHING = Cost()


@dataclass(frozen=True)
class Costs:
    """Cost of each operation of a task for one particle.

    Args:
        steps: of the sampler.
        calls: network calls of one velocity.
        latent: unfinished samples are judged by a latent reward, without a decode.
    """

    steps: int
    calls: int
    latent: bool = False

    @property
    def velocity(self) -> Cost:
        """One velocity."""
        return Cost(self.calls)

    @property
    def score(self) -> Cost:
        """Decode and score."""
        return Cost(decodes=1, reward_calls=1)

    @property
    def sample(self) -> Cost:
        """From noise to a scored sample."""
        return self.sample_from(0)

    def sample_from(self, step: int) -> Cost:
        """From before ``step`` to a scored sample."""
        return (self.steps - step) * self.velocity + self.score

    @property
    def latent_reward(self) -> Cost:
        """One call of the latent reward."""
        return Cost(reward_calls=1)

    @property
    def value(self) -> Cost:
        """The value of an unfinished sample whose velocity is known."""
        return self.latent_reward if self.latent else self.score

    @property
    def value_and_grad(self) -> Cost:
        """Velocity, value and gradient at an unfinished sample."""
        return self.velocity + self.score + Cost(backward_calls=self.calls)

    @property
    def reward_grad_through_ode(self) -> Cost:
        """A sample with the gradient to its noise; of several steps each network call is made again going back."""
        calls = self.steps * self.calls
        return Cost(calls if self.steps == 1 else 2 * calls, 1, 1, calls)


class BudgetSpent(EarlyExit):
    """The next operation would exceed the budget; ends the method, not the search."""


class Meter:
    """Counter of the cost of the B prompts of one batch.

    Args:
        budget: the limits of each prompt.
        prompts: B.
        clock: seconds, for tests.
    """

    def __init__(self, budget: Budget, prompts: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.budget, self.prompts = budget, prompts
        self.counts = {name: [0] * prompts for name in COUNTS}
        self.busy = dict.fromkeys(COUNTS, 0.0)
        self._clock, self._started = clock, clock()

    @property
    def seconds(self) -> float:
        """Wall time so far, of all prompts together."""
        return self._clock() - self._started

    def spent(self, prompt: int) -> dict[str, float]:
        """Counts and seconds of one prompt."""
        return {
            **{name: values[prompt] for name, values in self.counts.items()},
            "seconds": self.seconds / self.prompts,
        }

    def require(self, cost: Cost, row: Tensor) -> None:
        """Raise BudgetSpent unless ``cost`` for every sample fits; ``row [N]`` numbers the samples' prompts."""
        limit = self.budget.seconds
        if limit is not None and self.seconds >= limit * self.prompts:
            raise BudgetSpent
        samples = row.bincount(minlength=self.prompts).tolist()
        for name, each in cost.items():
            most = getattr(self.budget, name, None)
            if most is None or not each:
                continue
            if any(
                count and have + count * each > most for have, count in zip(self.counts[name], samples, strict=True)
            ):
                raise BudgetSpent

    @contextmanager
    def measured(self, name: str, row: Tensor, each: int = 1) -> Iterator[None]:
        """Time the block and count ``each`` for every sample ``row [N]`` once it is done."""
        before = self._clock()
        yield
        if row.is_cuda:
            torch.cuda.synchronize()
        self.busy[name] += self._clock() - before
        for prompt, count in enumerate(row.bincount(minlength=self.prompts).tolist()):
            self.counts[name][prompt] += count * each

    def affordable(self, cost: Cost, wanted: int, reserve: Cost = NOTHING, prompt: int | None = None) -> int:
        """How many particles of ``cost``, at most ``wanted``, every prompt can pay if ``reserve`` must be left over.

        Args:
            prompt: ask for one alone.
        """
        for name, each in cost.items():
            most = getattr(self.budget, name, None)
            if most is not None and each:
                kept = getattr(reserve, name)
                spent = max(self.counts[name]) if prompt is None else self.counts[name][prompt]
                wanted = min(wanted, (most - spent - kept) // each)
        if self.budget.seconds is not None:
            seconds = self._duration(cost) * self.prompts
            left = self.budget.seconds * self.prompts - self.seconds - self._duration(reserve) * self.prompts
            wanted = min(wanted, int(left // seconds) if seconds else 1) if left > 0 else 0
        return max(wanted, 0)

    def _duration(self, cost: Cost) -> float:
        """Seconds of ``cost`` at the pace so far."""
        total = 0.0
        for name, each in cost.items():
            done = sum(self.counts[name])
            total += each * self.busy[name] / done if done else 0.0
        return total
