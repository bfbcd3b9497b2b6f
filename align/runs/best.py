"""The checkpoint with the best held-out score, kept beside the newest ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.runs import checkpoint, manifest
from alignflow.errors import CheckpointError, ConfigError


class Best:
    """The step after which a held-out score was highest, of several alike the first; the base does not count.

    Args:
        name: of the score, ``checkpoint.best``; None keeps no best.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.step: int | None = None
        self.score = -math.inf

    def see(self, step: int, scores: Mapping[str, float | None], *, hacked: bool = False) -> bool:
        """Take note of an evaluation's scores; whether they are the best so far, which hacked ones never are."""
        score = None if self.name is None or hacked else scores.get(self.name)
        if step == 0 or score is None or not score > self.score:  # NaN is not greater
            return False
        self.step, self.score = step, float(score)
        return True

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint's counters."""
        return None if self.step is None else {"name": self.name, "step": self.step, "score": self.score}

    def load(self, state: Any) -> None:
        """Take back :meth:`state`; that of another score is left out."""
        if isinstance(state, dict) and state.get("name") == self.name and self.name is not None:
            self.step, self.score = int(state["step"]), float(state["score"])


def best_of(run: Path) -> Path:
    """The checkpoint of a run that did best by ``checkpoint.best``.

    Raises:
        ConfigError: the run keeps none.
        CheckpointError: nothing was evaluated yet, or the checkpoint has gone.
    """
    newest = checkpoint.latest(run / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    try:
        state = manifest.read(newest)["counters"].get("best")
    except manifest.DamagedError as error:
        raise CheckpointError(f"checkpoint {newest}: {error}") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise ConfigError(
            f"{run} keeps no best checkpoint: set checkpoint.best to the name of a reward under evaluate.rewards"
        )
    path = run / "checkpoints" / f"step-{state['step']:06d}"
    if not path.is_dir():
        raise CheckpointError(f"{run} was best after step {state['step']}, but {path} is missing")
    return path


def checkpoint_of(run: Path, name: str) -> Path:
    """A checkpoint of a run by name.

    Args:
        name: ``best``, the number of a step, or a folder.

    Raises:
        ConfigError, CheckpointError: as :func:`best_of`; the run has no checkpoint of this step.
    """
    if name == "best":
        return best_of(run)
    if not name.isdecimal():
        return Path(name)
    path = run / "checkpoints" / f"step-{int(name):06d}"
    if not path.is_dir():
        steps = ", ".join(map(str, manifest.list_steps(run / "checkpoints"))) or "none"
        raise CheckpointError(f"{run} has no checkpoint of step {name}; there are {steps}")
    return path
