"""Progress of a run for people: one updating line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from align.runs.forecast import Forecast, Kind, clock

if TYPE_CHECKING:
    from rewards.base import Reward

PHASES = {
    "rollout": "drawing samples",
    "decode": "decoding",
    "reward": "scoring",
    "update": "learning",
    "evaluate": "evaluating",
}
"""Phase of a training step -> text of the line during it."""
LEARNED = {"loss": "loss", "accuracy": "pair accuracy"}
"""Entry of a training step's row -> its name in the line of a run without a reward."""


class Progress:
    """Progress of ``total`` units, of which ``done`` were made by an earlier part of the run.

    Args:
        quiet: print nothing (every process but the main one).
        unit: what is counted: training steps, prompts of a search.
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False, unit: str = "step") -> None:
        self.total, self.first, self.quiet, self.unit = total, done, quiet, unit
        self.started = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.line = f"{unit} {done}/{total}"
        self.forecast: Forecast | None = None
        self._mark = self.started

    def foresee(self, forecast: Forecast) -> None:
        """Say the time that is left by a forecast, whose first unit begins now."""
        self.forecast, self._mark = forecast, time.monotonic()

    def update(self, done: int, values: Mapping[str, str]) -> None:
        """Report ``done`` finished units with a few named values, ready to print."""
        self.finished("step", done)
        shown = "  ".join(f"{name} {value}".strip() for name, value in values.items())
        self.line = "  ".join(
            part for part in (f"{self.unit} {done}/{self.total}", shown, f"{clock(self._left(done))} left") if part
        )
        self._write(self.line, end="\r" if self.terminal else "\n")

    def finished(self, kind: Kind, at: int) -> None:
        """Time a unit of the forecast, the one of this kind that ends at step ``at``."""
        now = time.monotonic()
        if self.forecast is not None:
            self.forecast.finished(kind, at, now - self._mark)
        self._mark = now

    def _left(self, done: int) -> float:
        """Seconds ahead: those of the forecast, else in proportion to the units done."""
        left = self.forecast.left if self.forecast is not None else None
        elapsed = time.monotonic() - self.started
        return elapsed / max(done - self.first, 1) * (self.total - done) if left is None else left

    def doing(self, what: str, done: int = 0, of: int = 0) -> None:
        """The current activity inside the unit in progress; shown only on a terminal's line, which updates itself.

        Args:
            done: samples or terms of this process that the activity is through with.
            of: how many there are; 0 = not known.
        """
        if self.terminal:
            count = f" {done}/{of}" if of else ""
            self._write(f"{self.line}  {PHASES.get(what, what)}{count} ...", end="\r")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(text, end="\n")

    def _write(self, text: str, end: str) -> None:
        if not self.quiet:
            clear = "\x1b[2K" if self.terminal else ""
            print(f"{clear}{text}", end=end, flush=True)


def said(value: float) -> str:
    """A score as the line shows it."""
    return f"{round(value, 3) or 0.0:.3f}" if math.isfinite(value) else "no score"


def shown(row: Mapping[str, Any], reward: Reward | None) -> dict[str, str]:
    """Values of a training step's row in the progress line; for a reward that compares samples, its parts.

    Without a reward, as on stored pairs, the scores of the file say nothing about the policy: the line shows the loss
    and, of pairs, the share that the policy favours as the file does.
    """
    compares = reward is not None and reward.scope in ("group", "batch")
    parts = {name: said(value) for name, value in row.items() if compares and name.startswith("reward/")}
    learned = {name: said(row[key]) for key, name in LEARNED.items() if reward is None and key in row}
    shown = (parts or learned or {"reward": said(row["reward"])}) | {"": f"{row['images_per_second']:.3g} samples/s"}
    return shown | ({"missing": f"{row['missing']} of {row['samples']}"} if row["missing"] else {})
