"""Choice of the items that a step uses, as a function of the step alone: one source, or several with weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from align.maths.schedules import value_at
from align.maths.seeds import derive

Weight = Sequence[tuple[int, float]]
"""Weight of a source by rollout; see :func:`~align.maths.schedules.value_at`."""


def indices_at(step: int, count: int, total: int, seed: int) -> list[int]:
    """Items out of ``total`` that a step uses: pass after pass, each freshly shuffled; a function of the step alone."""
    return passes(step * count, (step + 1) * count, total, seed)


def passes(position: int, end: int, total: int, seed: int) -> list[int]:
    """Items at the places ``position .. end`` of an endless sequence of shuffled passes over ``total`` items."""
    chosen: list[int] = []
    while position < end:
        epoch, offset = divmod(position, total)
        some = _order(total, derive(seed, "epoch", epoch))[offset : offset + end - position]
        chosen += some.tolist()
        position += len(some)
    return chosen


class Shares:
    """Number of items of a step from each source: over many steps in proportion to the weights, to within one item.

    Args:
        weights: of the sources.
        count: items per step.
    """

    def __init__(self, weights: Sequence[Weight], count: int) -> None:
        self.weights, self.count = weights, count
        self._used = [np.zeros(len(weights), dtype=np.int64)]
        self._due = np.zeros(len(weights))

    def at(self, step: int) -> tuple[list[int], list[int]]:
        """Items that each source gave before a step, and gives in it."""
        while len(self._used) <= step + 1:
            weights = np.array([value_at(weight, len(self._used) - 1) for weight in self.weights])
            self._due += self.count * weights / weights.sum()
            self._used.append(self._used[-1] + self._whole(weights > 0))
        before, after = self._used[step], self._used[step + 1]
        return before.tolist(), (after - before).tolist()

    def _whole(self, wanted: np.ndarray) -> np.ndarray:
        """The items of the next step: one at a time from the source that is furthest behind its due."""
        given = np.zeros(len(self.weights), dtype=np.int64)
        for _ in range(self.count):
            behind = np.where(wanted, self._due - self._used[-1] - given, -np.inf)
            given[behind.argmax()] += 1
        return given


def mixed_at(step: int, shares: Shares, totals: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """Items of several sources that a step uses, as (source, item).

    One source gives the items of :func:`indices_at`.

    Args:
        totals: items of each source; all of them at least 1.
    """
    before, given = shares.at(step)
    chosen = []
    for source, (used, some, total) in enumerate(zip(before, given, totals, strict=True)):
        own = derive(seed, "source", source) if source else seed
        chosen += [(source, row) for row in passes(used, used + some, total, own)]
    return chosen


@lru_cache(
    maxsize=16
)  # a pass's order is asked for at every step of it: of every source the one going on, and the next
def _order(total: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(total)
