"""Bounded runs of many small cases: no traceback, no hang, no gigabyte.

A case is a label and a call. A call passes if it returns or raises one of the errors that are written for people.
"""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterable, Iterator

SECONDS = 5
"""CPU seconds that a case may take; wall time would measure the neighbours of a busy machine."""

BYTES = 1 << 30
"""Address space that a case may add."""


class Hang(BaseException):
    """The case took longer than it may; no handler of ``Exception`` can catch it."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, more: int = BYTES) -> Iterator[None]:
    """Raise Hang after ``seconds`` of CPU, MemoryError beyond ``more`` bytes."""

    def stop(signum: int, frame: object) -> None:
        raise Hang(f"{seconds} s of CPU")

    before = signal.signal(signal.SIGPROF, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def failures(
    cases: Iterable[tuple[str, Callable[[], object]]], explained: tuple[type[BaseException], ...]
) -> tuple[int, list[str]]:
    """Run every case; the number run, and a line for each that was neither right nor explained."""
    count, found = 0, []
    for label, call in cases:
        count += 1
        try:
            with bounded():
                call()
        except explained as error:
            if not str(error).strip():
                found.append(f"{label}: {type(error).__name__} without a message")
        except (Exception, Hang, SystemExit) as error:
            found.append(f"{label}: {type(error).__name__}: {error!s:.200}")
    return count, found
