"""The number of CPU threads of a run, and the time of a network call, measured before its first step."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from align.data.inputs import encode
from align.data.prompts import Prompt
from alignflow import cores
from alignflow.words import count
from generators.base import Generator

SECONDS = 0.6
"""Time of all measured calls together."""
FEW = 8
"""Rows of the first call: a call of fewer rows is mostly overhead."""
MANY = 48
"""Rows of the call that the forecast uses, where the run's calls have as many."""
ROUNDS = 4
ALIKE = 1.03
"""Fewer threads win where they are at most this much slower."""


@dataclass(frozen=True)
class Speed:
    """How a run computes.

    Args:
        threads: of torch on the CPU.
        said: one line on the number and its reason; empty on a GPU.
        seconds: of a network call of one row without gradient; None where nothing was measured.
    """

    threads: int
    said: str
    seconds: float | None


def candidates(limit: int) -> list[int]:
    """Numbers of threads that are compared, falling: the cores, and halves of them down to 1."""
    found = [max(1, limit)]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def fastest(seconds: Mapping[int, Sequence[float]]) -> int:
    """The number of threads with the smallest median; the smallest number within 3 % of it.

    Args:
        seconds: number of threads -> times of equal calls.
    """
    medians = {threads: statistics.median(times) for threads, times in seconds.items()}
    best = min(medians.values())
    return min(threads for threads, median in medians.items() if median <= ALIKE * best)


def fixed(setting: int | None, before: int | None = None) -> tuple[int | None, str]:
    """The number of threads where it is not to be measured, None for torch's own; and the reason, empty to measure.

    Args:
        setting: ``train.threads``.
        before: the number that a resumed run began with.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if setting:
        return setting, "train.threads"
    if name := cores.given():
        return None, name
    if world > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return cores.threads_each(local), f"{count(int(cores.cores()), 'core')} for {local} processes"
    return (before, "as in the run's first part") if before else (None, "")


def settle(
    generator: Generator,
    prompts: Sequence[Prompt],
    rows: int,
    *,
    setting: int | None = None,
    before: int | None = None,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    shared: bool = False,
) -> Speed:
    """Choose the number of threads, set it, and time this process's network calls.

    On the CPU calls of every candidate take turns, so that another program slows all of them. A call that fails is left
    to the run, and nothing is measured then. Neither weights nor random numbers nor counts of calls change.

    Args:
        prompts: the first one is encoded for the calls.
        rows: of a call of the run.
        context: what the run computes in, such as autocast.
        shared: several processes compute a call together, so all make the same two, and one that fails is an error.
    """
    number, why = fixed(setting, before)
    if number:
        torch.set_num_threads(number)
    on_cpu = generator.device.type == "cpu"
    said = f"threads: {torch.get_num_threads()} ({why})" if why and on_cpu else ""
    if not prompts:
        return Speed(torch.get_num_threads(), said, None)
    calls = generator.network_calls
    try:
        with torch.no_grad(), torch.random.fork_rng(), context():
            call = _Call(generator, prompts[0])
            if shared or not on_cpu:
                return Speed(torch.get_num_threads(), said, call(min(rows, FEW) if on_cpu else rows, warm=True))
            if said:
                some = _affordable(call, rows, 2)
                return Speed(torch.get_num_threads(), said, _timed(call, rows, some))
            return _chosen(call, rows)
    except Exception:  # the run makes the same call, checks its inputs first, and says where it failed
        if shared:
            raise
        return Speed(torch.get_num_threads(), said, None)
    finally:
        generator.network_calls = calls


class _Call:
    """Timed network calls for one prompt."""

    def __init__(self, generator: Generator, prompt: Prompt) -> None:
        self.generator, self.cond = generator, encode(generator, [prompt])[0]
        self.noise = generator.noise([0])

    def __call__(self, rows: int, warm: bool = False) -> float:
        """Seconds per row of a call of ``rows`` rows, of the second of two calls if ``warm``."""
        if warm:
            self(rows)
        x = self.noise.expand(rows, *self.noise.shape[1:]).contiguous()
        cond, t = self.cond[torch.zeros(rows, dtype=torch.long, device=x.device)], torch.full((rows,), 0.7)
        _synchronise(x)
        began = time.perf_counter()
        self.generator.velocity(x, t, cond)
        _synchronise(x)
        return (time.perf_counter() - began) / rows


def _synchronise(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _affordable(call: _Call, rows: int, calls: int) -> int:
    """Rows with which ``calls`` calls take about :data:`SECONDS`, at most ``rows``; 0 where one of a few takes more."""
    few = min(rows, FEW)
    one = call(few)
    if one * few > SECONDS:
        return 0
    return max(few, min(rows, int(SECONDS / calls / min(one, call(few)))))


def _timed(call: _Call, rows: int, affordable: int) -> float:
    """Seconds per row, of many rows where they are affordable."""
    return call(min(rows, max(affordable, MANY))) if affordable else call(1)


def _chosen(call: _Call, rows: int) -> Speed:
    """The fastest number of threads on this machine as it is now."""
    numbers = candidates(int(cores.cores()))
    torch.set_num_threads(numbers[0])
    some = _affordable(call, rows, len(numbers) * ROUNDS)
    if not some or len(numbers) == 1:
        why = "one core" if len(numbers) == 1 else "all cores; a network call takes too long to compare numbers"
        return Speed(numbers[0], f"threads: {numbers[0]} ({why})", _timed(call, rows, some))
    seconds: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(ROUNDS):
        for number in numbers:
            torch.set_num_threads(number)
            call(1)
            seconds[number].append(call(some))
    best = fastest(seconds)
    torch.set_num_threads(best)
    times = {number: statistics.median(some) for number, some in seconds.items()}
    others = ", ".join(f"{1000 * times[number]:.3g} with {number}" for number in numbers if number != best)
    said = f"threads: {best} of {count(numbers[0], 'core')} ({1000 * times[best]:.3g} ms a network call, {others})"
    return Speed(best, said, _timed(call, rows, some))
