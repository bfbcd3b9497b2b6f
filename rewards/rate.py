"""Frame rate of the videos being scored, for rewards that depend on time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

USUAL = 16.0
"""Rate if neither a setting nor the file gives one."""

_given: ContextVar[float | None] = ContextVar("frames a second", default=None)


@contextmanager
def videos_at(fps: float | None) -> Iterator[None]:
    """Inside the block, rewards called in this thread use ``fps`` as the rate of their videos; None = unknown."""
    token = _given.set(fps)
    try:
        yield
    finally:
        _given.reset(token)


def fps_of(setting: float | None) -> float:
    """Frames per second: from the settings, from the file, or :data:`USUAL`.

    >>> with videos_at(30.0):
    ...     fps_of(None), fps_of(8.0)
    (30.0, 8.0)
    >>> fps_of(None)
    16.0
    """
    return setting or _given.get() or USUAL
