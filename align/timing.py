"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Seconds per named phase since the last :meth:`take`; what no phase claims is ``other``."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as ``name``; on a GPU the block ends when its kernels have."""
        before = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - before

    def take(self) -> dict[str, float]:
        """Seconds per phase, ``other`` included, and start over."""
        now = time.perf_counter()
        total = now - self._started
        spent = {**self._seconds, "other": max(total - sum(self._seconds.values()), 0.0)}
        self._seconds, self._started = {}, now
        return spent
