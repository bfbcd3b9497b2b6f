"""CPU cores that a command may use, and settings of its threads."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

POLICY, EQUAL_BITS = "OMP_WAIT_POLICY", "MKL_CBWR"
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user sets the number of threads."""


def cores(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores by affinity and by the container's quota, which may be a fraction."""
    found = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota = (group / "cpu.max").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        quota = []
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]):
        found = min(found, int(quota[0]) / int(quota[1]))
    return found


def threads_each(processes: int) -> int:
    """Threads for each of several processes on this machine: its cores divided among them, 1 or more."""
    return max(1, int(cores() / processes))


def set_up(environment: MutableMapping[str, str]) -> None:
    """Variables that OpenMP and MKL read when torch is imported; those of the user stay.

    OpenMP's threads sleep while they wait. The load of a machine changes during a run and the variable is read once:
    threads that spin are a fifth faster on an idle machine, and half as fast beside another busy program
    (``docs/benchmarks.md``). MKL adds up products in an order that does not depend on the number of threads, so that
    the number may be chosen by measurement.
    """
    environment.setdefault(POLICY, "passive")
    environment.setdefault(EQUAL_BITS, "AUTO,STRICT")


def given(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """The variable by which the user sets the number of threads, None where there is none."""
    return next((name for name in COUNTS if environment.get(name)), None)
