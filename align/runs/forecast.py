"""Forecast of the time that a run takes: its network calls are counted, a few of them are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["step", "evaluate"]


@dataclass(frozen=True)
class Unit:
    """A training step or an evaluation.

    Args:
        at: steps made when it ends.
        sampled: network calls that sample, of all processes.
        learned: network calls of the updates, of all processes.
        samples: samples that the process with the most of them decodes and scores.
        work: network calls of that process in units of one without gradient.
    """

    kind: Kind
    at: int
    sampled: float
    learned: float
    samples: int
    work: float

    @property
    def calls(self) -> float:
        """All its network calls."""
        return self.sampled + self.learned


class Forecast:
    """Seconds that the units ahead take.

    A unit takes its work times the measured time of a call, and the time that decoding and scoring took in finished
    evaluations. Once units of a kind are finished, their own time replaces both.

    Args:
        units: ahead, in order.
        seconds: of a network call of one row without gradient, in the slowest process; None where it was not measured.
        exact: whether calls are counted for this recipe rather than estimated.
    """

    def __init__(self, units: Sequence[Unit], seconds: float | None, exact: bool = True) -> None:
        self.units, self.seconds, self.exact = list(units), seconds, exact
        self.took: dict[Kind, tuple[float, float]] = {}
        self.overhead = 0.0
        """Seconds per sample beside network calls, in evaluations."""

    @property
    def calls(self) -> int:
        """Network calls of the units ahead."""
        return round(sum(unit.calls for unit in self.units))

    def finished(self, kind: Kind, at: int, seconds: float) -> None:
        """The unit of this kind that ends at step ``at`` took ``seconds``; nothing where none does."""
        for unit in [one for one in self.units if (one.kind, one.at) == (kind, at)]:
            self.units.remove(unit)
            before, work = self.took.get(kind, (0.0, 0.0))
            self.took[kind] = before + seconds, work + unit.work
            if kind == "evaluate" and self.seconds and unit.samples:
                self.overhead = max(0.0, seconds - self.seconds * unit.work) / unit.samples

    @property
    def left(self) -> float | None:
        """Seconds of all units ahead; None where a kind of unit was neither measured nor finished."""
        times = [self._seconds(unit) for unit in self.units]
        return None if None in times else sum(one for one in times if one is not None)

    def _seconds(self, unit: Unit) -> float | None:
        took, work = self.took.get(unit.kind, (0.0, 0.0))
        if work:
            return took / work * unit.work
        return None if self.seconds is None else self.seconds * unit.work + self.overhead * unit.samples

    def said(self) -> str:
        """The forecast in words, before the first unit."""
        parts = {
            "to sample": sum(unit.sampled for unit in self.units if unit.kind == "step"),
            "to learn": sum(unit.learned for unit in self.units),
            "held-out": sum(unit.calls for unit in self.units if unit.kind == "evaluate"),
        }
        split = ", ".join(f"{round(number):,} {name}" for name, number in parts.items() if number)
        about = "" if self.exact else "about "
        line = f"forecast: {about}{self.calls:,} network calls ({split})"
        return line if self.left is None else f"{line}, {clock(self.left)} here, scoring not included"


def clock(seconds: float) -> str:
    """Seconds as ``3:07`` or ``1:02:45``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
