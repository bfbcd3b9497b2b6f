"""Phase of a run in which an error happened. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def phase_named(name: str) -> Iterator[None]:
    """Let :func:`phase_of` tell of an error that leaves the block that it happened in ``name``."""
    try:
        yield
    except Exception as error:
        if phase_of(error) is None:
            error.__dict__["alignflow_phase"] = name
        raise


def phase_of(error: BaseException) -> str | None:
    """The phase that an error happened in, None where it is not known."""
    return error.__dict__.get("alignflow_phase")
