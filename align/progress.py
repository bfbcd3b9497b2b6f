"""What a person sees while a run goes on: one line that renews itself in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from alignflow.secrets import shown


class Progress:
    """Progress of ``total`` updates, of which ``done`` were made by an earlier part of the run.

    Args:
        quiet: print nothing (every process but the main one).
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False) -> None:
        self.total, self.first, self.quiet = total, done, quiet
        self.started = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Report ``step`` finished updates with a few named values."""
        elapsed = time.monotonic() - self.started
        left = elapsed / max(step - self.first, 1) * (self.total - step)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        self._write(f"update {step}/{self.total}  {shown}  {clock(left)} left", end="\r" if self.terminal else "\n")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(text, end="\n")

    def _write(self, text: str, end: str) -> None:
        if not self.quiet:
            clear = "\x1b[2K" if self.terminal else ""
            print(f"{clear}{shown(text)}", end=end, flush=True)


def clock(seconds: float) -> str:
    """Seconds as ``3:07`` or ``1:02:45``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
