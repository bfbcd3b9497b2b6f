"""Phase of a run in which an error happened. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def phase_named(name: str) -> Iterator[None]:
    """Make :func:`phase_of` return ``name`` for an error that leaves the block."""
    try:
        yield
    except Exception as error:
        if phase_of(error) is None:
            error.__dict__["alignflow_phase"] = name
        raise


def phase_of(error: BaseException) -> str | None:
    """The phase that an error happened in, None if it is not known."""
    return error.__dict__.get("alignflow_phase")
