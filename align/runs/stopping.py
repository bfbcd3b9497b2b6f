"""Graceful stop: the first Ctrl-C, SIGTERM or SIGUSR1 ends a run after the current step, with a checkpoint; a second at
once. Schedulers send SIGTERM or SIGUSR1 before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from alignflow.waiting import ask_to_stop, forget_stop


class GracefulStop:
    """Context in which the first interrupt only sets :attr:`asked`.

    Args:
        say: reports to the user that the interrupt was received.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked = False
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            forget_stop()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            forget_stop()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        ask_to_stop()
        self._say("stopping after this step and its checkpoint; interrupt again to stop at once")
