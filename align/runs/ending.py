"""Early end of a run: too many evaluations without a better one, or a hacked reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.config.sections import Evaluate


class EarlyEnd:
    """Evaluations so far, from which early ends follow; a part of every checkpoint.

    Args:
        settings: ``patience`` and ``hacking``.
    """

    def __init__(self, settings: Evaluate) -> None:
        self.settings = settings
        self.step, self.idle = 0, 0
        self.hacked: str | None = None

    def see(self, step: int, better: bool, hacked: str | None) -> None:
        """Take note of an evaluation: whether it is the best so far, and why its reward is hacked, if it is."""
        self.step, self.hacked = step, hacked
        self.idle = 0 if better else self.idle + (step > 0)

    @property
    def reason(self) -> str | None:
        """The reason why the run should end before its last step; None = it should not."""
        if self.hacked is not None and self.settings.hacking == "stop":
            return f"stopped early at step {self.step}, as set by evaluate.hacking: the reward is hacked"
        if self.settings.patience is not None and self.idle >= self.settings.patience:
            return f"stopped early at step {self.step}: {self.idle} evaluations in a row without a better one"
        return None

    def state(self) -> dict[str, Any]:
        """For a checkpoint's counters."""
        return {"step": self.step, "idle": self.idle, "hacked": self.hacked}

    def load(self, state: Any) -> None:
        """Take back :meth:`state`; checkpoints of older versions have none."""
        if isinstance(state, dict):
            self.step, self.idle, self.hacked = int(state["step"]), int(state["idle"]), state["hacked"]
