"""The loop of a language model that learns: steps, checkpoints, and measurements before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align.data.files import write_json
from align.rewriting.evolve import read_batch
from align.rewriting.learner import Learner
from align.runs.run_folder import RunFolder
from align.runs.stopping import GracefulStop

COLLECTED = "collected"
"""Folder of the replies that a method learns from, a file for each batch of prompts."""
TOGETHER = 8
"""Prompts whose replies are collected together."""


class Loop:
    """One run, from its checkpoint or from nothing. A subclass has :meth:`measured` and :meth:`method_step`.

    Args:
        checkpoint: steps between checkpoints.
    """

    def __init__(self, run: RunFolder, learner: Learner, checkpoint: int, say: Callable[[str], None]) -> None:
        self.folder, self.learner, self.every, self.say = run, learner, checkpoint, say
        self.file = run.path / "checkpoint" / "state.pt"

    def measured(self, when: str) -> dict[str, Any] | None:
        """Measurements on held-out data ``before`` and ``after``; None if there are none."""
        raise NotImplementedError

    def method_step(self) -> Callable[[int], dict[str, float]]:
        """The step of the method, a function of its number and the learner alone; returns metrics."""
        raise NotImplementedError

    def loop(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All steps; what was measured before and after them.

        Raises:
            KeyboardInterrupt: after a step and its checkpoint, when the user stopped it.
        """
        learner, steps = self.learner, self.learner.method.steps
        resumed = learner.load(self.file)
        self.folder.forget_after(learner.step if resumed else -1)
        before = self._logged("before", 0) or self.measured("before")
        step = self.method_step()
        with GracefulStop(self.say) as stop:
            while learner.step < steps:
                found = step(learner.step)
                learner.step += 1
                self.folder.log({"event": "train", "step": learner.step, **found})
                self.say(f"step {learner.step}/{steps}  " + shown(found))
                last = learner.step == steps
                if last or stop.asked or learner.step % self.every == 0:
                    self.folder.sync()
                    self.file.parent.mkdir(exist_ok=True)
                    learner.save(self.file)
                if stop.asked and not last:
                    raise KeyboardInterrupt
        after = self._logged("after", learner.step) or self.measured("after")
        return before or {}, after or {}

    def _logged(self, event: str, step: int) -> dict[str, Any] | None:
        """Measurements of an earlier part of the run at this step."""
        rows = self.folder.rows()
        return next((row for row in rows if (row["event"], row["step"]) == (event, step)), None)

    def collected(
        self, count: int, written: Callable[[range], list[dict[str, Any]]], what: str
    ) -> list[dict[str, Any]]:
        """Rows of ``written`` for ``count`` prompts, a batch at a time; batches that are on the disk are read.

        Args:
            what: beginning of the progress line, such as ``rewrites of``.
        """
        rows = list[dict[str, Any]]()
        for start in range(0, count, TOGETHER):
            file, stop = self.folder.path / COLLECTED / f"{start:06d}.json", min(start + TOGETHER, count)
            if (found := read_batch(file)) is None:
                found = written(range(start, stop))
                write_json(file, found)
            rows += found
            self.say(f"{what} {stop}/{count} prompts")
        return rows


def shown(values: dict[str, Any]) -> str:
    """The most telling of these metrics in one line."""
    names = [name for name in values if name in ("loss", "reward", "kl", "accuracy")] or list(values)
    return "  ".join(f"{name} {values[name]:.4g}" for name in names)
