"""What a search may cost and what it has cost: one object counts, and nothing runs that would go beyond it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import Field, model_validator

from align.tree import Settings
from align.variants import problem_at

if TYPE_CHECKING:
    from torch import Tensor

COUNTS = ("network_calls", "decodes", "reward_calls", "backward_calls")
"""What is counted by samples; seconds come beside."""
LIMITS = ("network_calls", "decodes", "reward_calls", "seconds")
"""What can be the limit."""


class Budget(Settings):
    """What one prompt may cost; the first limit that is reached ends its search."""

    network_calls: int | None = Field(None, ge=1, description="samples times network calls; guidance makes it two")
    decodes: int | None = Field(None, ge=1, description="samples decoded")
    reward_calls: int | None = Field(None, ge=1, description="samples scored")
    seconds: float | None = Field(
        None, gt=0, description="wall time; of prompts searched together each has an equal share"
    )

    @model_validator(mode="after")
    def _limited(self) -> Self:
        if all(getattr(self, name) is None for name in LIMITS):
            raise problem_at("", f"needs at least one of {', '.join(LIMITS)}: a search goes on until one is spent")
        return self

    def __str__(self) -> str:
        given = [(name, getattr(self, name)) for name in LIMITS]
        return ", ".join(_words(name, value) for name, value in given if value is not None)


class Cost(NamedTuple):
    """What one particle of a method costs. A network call counts as the generator counts it: two with guidance."""

    network_calls: int = 0
    decodes: int = 0
    reward_calls: int = 0
    backward_calls: int = 0

    def __str__(self) -> str:
        return ", ".join(_words(name, value) for name, value in self._asdict().items() if value)


def _words(name: str, value: float) -> str:
    words = name.replace("_", " ")
    return f"{value:.9g} {words.removesuffix('s') if value == 1 else words}"


NOTHING = Cost()


def together(cost: Cost, *parts: tuple[Cost, int]) -> Cost:
    """``cost`` and several times each of ``parts``."""
    for part, times in parts:
        cost = Cost(*(a + times * b for a, b in zip(cost, part, strict=True)))
    return cost


class BudgetSpent(Exception):  # noqa: N818
    """The next operation would go beyond the budget; ends the method, not the search."""


class Meter:
    """Counts what the B prompts of one batch have cost.

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
        for name, each in cost._asdict().items():
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
            import torch

            torch.cuda.synchronize()
        self.busy[name] += self._clock() - before
        for prompt, count in enumerate(row.bincount(minlength=self.prompts).tolist()):
            self.counts[name][prompt] += count * each

    def affordable(self, cost: Cost, wanted: int, reserve: Cost = NOTHING, prompt: int | None = None) -> int:
        """How many particles of ``cost``, at most ``wanted``, every prompt can pay if ``reserve`` must be left over.

        Args:
            prompt: ask for one alone.
        """
        for name, each in cost._asdict().items():
            most = getattr(self.budget, name, None)
            if most is not None and each:
                kept = getattr(reserve, name)
                spent = max(self.counts[name]) if prompt is None else self.counts[name][prompt]
                wanted = min(wanted, (most - spent - kept) // each)
        if self.budget.seconds is not None:
            left = self.budget.seconds * self.prompts - self.seconds - self._duration(reserve) * self.prompts
            each = self._duration(cost) * self.prompts
            wanted = min(wanted, int(left // each) if each else 1) if left > 0 else 0
        return max(wanted, 0)

    def _duration(self, cost: Cost) -> float:
        """Seconds of ``cost`` at the pace so far."""
        total = 0.0
        for name, each in cost._asdict().items():
            done = sum(self.counts[name])
            total += each * self.busy[name] / done if done else 0.0
        return total
