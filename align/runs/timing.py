"""Time spent in each phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from align.runs.phases import phase_named


class Phases:
    """Seconds per named phase since the last :meth:`take`; what no phase claims is ``other``.

    Args:
        entered: is called with a phase's name when it begins, and with name, done and total by :meth:`counted`.
    """

    def __init__(self, entered: Callable[..., None] | None = None) -> None:
        self.entered = entered
        self._name = ""
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as ``name``; on a GPU the block ends when its kernels have."""
        self._name = name
        if self.entered is not None:
            self.entered(name)
        before = time.perf_counter()
        try:
            with phase_named(name):
                yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - before

    def counted(self, done: int, of: int) -> None:
        """Report that the phase that began last is through with ``done`` of its ``of`` samples or terms."""
        if self.entered is not None:
            self.entered(self._name, done, of)

    def take(self) -> dict[str, float]:
        """Seconds per phase, ``other`` included, and start over."""
        now = time.perf_counter()
        total = now - self._started
        spent = {**self._seconds, "other": max(total - sum(self._seconds.values()), 0.0)}
        self._seconds, self._started = {}, now
        return spent
