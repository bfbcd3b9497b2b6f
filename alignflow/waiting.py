"""Stop requests for code that waits on servers and workers while a run is ending."""

from __future__ import annotations

import time

GRACE = 2.0
"""Seconds that an answer under way still has once a stop was asked for."""

_asked: float | None = None


class Stopped(KeyboardInterrupt):
    """Waiting ended because the run is stopping."""


def ask_to_stop() -> None:
    """Every wait ends within :data:`GRACE` seconds; safe in a signal handler."""
    global _asked
    _asked = _asked or time.monotonic()


def forget_stop() -> None:
    """Waits are patient again: another run begins or this one has ended."""
    global _asked
    _asked = None


def check_stop(grace: float = GRACE) -> None:
    """Raise Stopped where a stop was asked for more than ``grace`` seconds ago."""
    if _asked is not None and time.monotonic() - _asked >= grace:
        raise Stopped("stopped while waiting for an answer")


def pause(seconds: float) -> None:
    """Sleep, unless a stop is asked for: then raise Stopped at once."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        check_stop(0)
        time.sleep(min(left, 0.05))
    check_stop(0)
