"""Remote scoring in parts: several at once, retried after a pause, abandoned with a reason."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignflow.errors import AlignflowError
from alignflow.lazy import lazy
from alignflow.waiting import check_stop, pause
from rewards.base import Scores
from rewards.parts import Part, joined

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


logger = logging.getLogger(__name__)
LONGEST_PAUSE = 30.0


class UnansweredError(AlignflowError):
    """A part was not scored.

    Args:
        why: for people.
        again: whether another attempt may help.
        after: seconds that the other side asks to wait before it.
    """

    def __init__(self, why: str, again: bool = True, after: float = 0.0) -> None:
        super().__init__(why)
        self.again, self.after = again, after


@dataclass
class Dispatcher:
    """Scores parts with ``ask`` and returns the scores in order; :meth:`each` does the same with any other request.

    Once a part has been given up, the others are asked once each and not waited for, until one answers: the pause is
    paid once a call, not once a part.

    Args:
        ask: scores one part or raises UnansweredError.
        parallel: parts asked for at a time.
        retries: attempts after the first.
        backoff: seconds before the second attempt, doubled for every further one, 30 at most.
    """

    ask: Callable[[Any], Any]
    parallel: int
    retries: int
    backoff: float
    hopeless: bool = False
    abandoned: threading.Event = field(default_factory=threading.Event)

    def __call__(self, parts: Sequence[Part]) -> Scores:
        """Scores of all samples; NaN with the reason for those of a part that was given up."""
        return joined(parts, self.each(parts, lambda part, why: nothing(len(part.rows), why)))

    def each(self, parts: Sequence[Any], give_up: Callable[[Any, str], Any]) -> list[Any]:
        """The result of ``ask`` for each part, or ``give_up(part, reason)``.

        Raises:
            Stopped: the run was asked to stop and the answers did not come soon. Threads that still wait are daemons:
                they keep no process alive.
        """
        self.hopeless, self.abandoned = False, threading.Event()
        todo: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        for numbered in enumerate(parts):
            todo.put(numbered)
        for _ in range(min(self.parallel, len(parts))):
            arguments = (todo, done, give_up, self.abandoned)
            threading.Thread(target=self._work, args=arguments, daemon=True, name="ask").start()
        found: dict[int, Any] = {}
        try:
            while len(found) < len(parts):
                try:
                    index, value, error = done.get(timeout=0.1)
                except queue.Empty:
                    check_stop()
                    continue
                if error is not None:
                    raise error
                found[index] = value
        finally:
            self.abandoned.set()
        return [found[index] for index in range(len(parts))]

    def _work(
        self, todo: queue.SimpleQueue, done: queue.SimpleQueue, give_up: Callable, abandoned: threading.Event
    ) -> None:
        while not abandoned.is_set():
            try:
                index, part = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, self._insist(part, give_up, abandoned), None))
            except BaseException as error:
                done.put((index, None, error))

    def _insist(self, part: Any, give_up: Callable[[Any, str], Any], abandoned: threading.Event) -> Any:
        attempt = 1
        while True:
            try:
                found = self.ask(part)
            except UnansweredError as error:
                if not error.again or self.hopeless or attempt > self.retries or abandoned.is_set():
                    self.hopeless = error.again
                    tried = f" ({attempt} attempts)" if attempt > 1 else ""
                    return give_up(part, f"{error}{tried}")
                seconds = pause_before(attempt, self.backoff, error)
                logger.warning("%s; trying again in %g s", error, seconds)
                pause(seconds)
                attempt += 1
            else:
                self.hopeless = False
                return found


def pause_before(attempt: int, backoff: float, error: UnansweredError) -> float:
    """Seconds to wait after attempt ``attempt`` (from 1): doubled each time, or what the server asks; 30 at most."""
    return min(max(backoff * 2 ** min(attempt - 1, 30), error.after), LONGEST_PAUSE)


def nothing(count: int, why: str) -> Scores:
    """No score for any of ``count`` samples, for the same reason."""
    return Scores(torch.full((count,), torch.nan), dict.fromkeys(range(count), why))
