"""A checkpoint of the last complete step, saved if the next one fails."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from align.runs import checkpoint
from alignflow.errors import DataError
from alignflow.text import first_line

if TYPE_CHECKING:
    from align.training.keeping import Keeping


class Rescue:
    """Context that leaves a checkpoint of the last whole step when the block raises an exception.

    No process waits for another here: the others may be gone. So none is written where each holds a part of the
    weights.

    Args:
        stored: step of the newest checkpoint, 0 if there is none.
        say: called with a line for the user.
    """

    def __init__(self, keeping: Keeping, stored: int, say: Callable[[str], None]) -> None:
        self.keeping, self.stored, self.say = keeping, stored, say
        self.whole: tuple[int, dict[str, Any], Any, Any] | None = None
        self.moved = False
        """Whether something besides weights and optimizer has changed since :meth:`mark`."""

    def mark(self, step: int) -> None:
        """``step`` steps are whole."""
        counted = self.keeping.counters()
        self.whole, self.moved = (step, counted, checkpoint.rng_state(), self._versions()), False

    def _versions(self) -> Any:
        return [(one.stepper.updates, one.roles.versions()) for one in self.keeping.state.learners.values()]

    def __enter__(self) -> Rescue:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.whole is None or not isinstance(error, Exception):
            return
        step, counted, rng, versions = self.whole
        mend = isinstance(error, DataError)
        if step == 0 or step < self.stored or (step == self.stored and not mend):
            return
        if self.keeping.state.processes.sharded:
            last = f"the last one is of step {self.stored}" if self.stored else "there is no earlier checkpoint"
            sharded = f"weights are sharded over the processes, so no checkpoint of step {step} is written"
            self.say(f"step {step + 1} failed; {sharded}; {last}")
            return
        if self.moved or versions != self._versions():
            self.say(f"step {step + 1} failed half way; the last checkpoint is of step {self.stored}")
            return
        try:
            checkpoint.restore_rng(rng)
            self.keeping.write(step, counted, any_data=mend)
        except Exception as failed:  # the first error is the one to show
            self.say(f"no checkpoint of step {step} could be written: {first_line(failed)}")
