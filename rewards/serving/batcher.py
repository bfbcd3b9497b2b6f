"""Batching of requests from many clients in one thread: small ones are merged, large ones split."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignflow.errors import AlignflowError
from alignflow.text import first_line
from rewards.base import Reward, RewardExitError, Scores
from rewards.parts import Part, joined
from rewards.serving.wire import Request

PIECE = 1 << 24
"""Pixels scored at once, unless one sample alone has more: nobody waits longer than that takes."""


class ClosingError(AlignflowError, RuntimeError):
    """The server ends; the request was not scored."""


@dataclass(eq=False)
class Job:
    """A request on its way: which rows are next, and the scores of those before."""

    request: Request
    future: Future[Scores] = field(default_factory=Future)
    row: int = 0
    pieces: list[tuple[Part, Scores]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Samples."""
        return len(self.request.prompts)

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more, or it has its answer."""
        return self.future.done()


Piece = tuple[Job, slice]


class Batcher:
    """Scores requests in its own thread.

    Clients take turns, whatever each has sent. A reward that scores each sample separately scores large requests in
    pieces, and small ones of one media size together. A request that leaves a merged batch without some scores is
    scored again alone, so that nobody pays for another's samples. Requests that were cancelled are not scored.

    Args:
        size: samples scored at once, unless a request that must be scored as one has more.
        window: seconds to wait for more once there is a request.
        waiting: requests that may wait; further ones are refused.
    """

    def __init__(self, reward: Reward, size: int, window: float, waiting: int = 256) -> None:
        self.reward, self.size, self.window, self.limit = reward, size, window, waiting
        self.turns: OrderedDict[Any, deque[Job]] = OrderedDict()
        self.changed = threading.Condition()
        self.closed = False
        self.busy_since: float | None = None
        self.last_error: str | None = None
        self.jobs: set[Job] = set()
        self.thread = threading.Thread(target=self._work, daemon=True, name="reward")
        self.thread.start()

    def submit(self, request: Request, client: Any = None) -> Future[Scores]:
        """Scores to come.

        Raises:
            queue.Full: so many requests wait already.
            ClosingError: the server ends.
        """
        job = Job(request)
        with self.changed:
            if self.closed:
                raise ClosingError
            if len(self.jobs) >= self.limit:
                raise queue.Full
            self.jobs.add(job)
            job.future.add_done_callback(lambda _: self.jobs.discard(job))
            self.turns.setdefault(client, deque()).append(job)
            self.changed.notify()
        return job.future

    @property
    def waiting(self) -> int:
        """Requests that wait or are being scored."""
        return len(self.jobs)

    def close(self) -> None:
        """Answer whatever waits with ClosingError; what is being scored is not waited for."""
        with self.changed:
            self.closed = True
            for job in tuple(self.jobs):
                with suppress(InvalidStateError):
                    job.future.set_exception(ClosingError())
            self.changed.notify()

    def _work(self) -> None:
        while not self.closed:
            pieces = self._next()
            self.busy_since = time.monotonic()
            buckets: dict[Any, list[Piece]] = {}
            for piece in pieces:
                buckets.setdefault(_shapes(piece[0].request), []).append(piece)
            for bucket in buckets.values():
                self._score(bucket)
            self.busy_since = None

    # -- whose turn it is -------------------------------------------------------------------------------------------

    def _next(self) -> list[Piece]:
        """Requests that are scored together next: one, or more if the reward scores each sample separately."""
        with self.changed:
            while (piece := self._take(self.size)) is None:
                self.changed.wait()
                if self.closed:
                    return []
            pieces = [piece]
            until = time.monotonic() + self.window
            left = self.size - _length(piece)
            while self.reward.scope == "sample" and left > 0:
                piece = self._take(left)
                if piece is not None:
                    pieces.append(piece)
                    left -= _length(piece)
                elif not self.changed.wait(until - time.monotonic()) or self.closed:
                    break
            return pieces

    def _take(self, most: int) -> Piece | None:
        """The next piece of the client whose turn it is, ``most`` samples where it may be cut."""
        while self.turns:
            client, jobs = self.turns.popitem(last=False)
            while jobs and (jobs[0].over or jobs[0].row >= jobs[0].count):
                jobs.popleft()
            if not jobs:
                continue
            job = jobs[0]
            rows = slice(job.row, job.count)
            if self.reward.scope == "sample":
                pixels = job.request.media[0, ..., 0, :, :].numel()
                rows = slice(job.row, min(job.count, job.row + most, job.row + max(1, PIECE // max(pixels, 1))))
            job.row = rows.stop
            self.turns[client] = jobs  # behind the others
            return job, rows
        return None

    # -- scoring ------------------------------------------------------------------------------------------------------

    def _score(self, pieces: Sequence[Piece]) -> None:
        pieces = [piece for piece in pieces if not piece[0].over]
        if not pieces:
            return
        try:
            found = self._together(pieces)
        except BaseException as error:  # a reward may call sys.exit; the thread must outlive it
            if len(pieces) > 1:
                found = [None] * len(pieces)
            else:
                self._fail(pieces[0][0], error)
                return
        for piece, scores in zip(pieces, found, strict=True):
            if scores is None or (len(pieces) > 1 and scores.reasons):
                self._score([piece])
            else:
                _finish(*piece, scores)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, Exception):
            error = RewardExitError(f"reward {self.reward.name!r} raised {type(error).__name__}: {first_line(error)}")
        self.last_error = first_line(error)
        with suppress(InvalidStateError):
            job.future.set_exception(error)

    def _together(self, pieces: Sequence[Piece]) -> list[Scores | None]:
        media = torch.cat([job.request.media[rows] for job, rows in pieces])
        prompts = [prompt for job, rows in pieces for prompt in job.request.prompts[rows]]
        inputs = {
            name: _cat([job.request.inputs[name][rows] for job, rows in pieces]) for name in pieces[0][0].request.inputs
        }
        group = pieces[0][0].request.group if len(pieces) == 1 else None
        group = None if group is None else group[pieces[0][1]]
        scores = self.reward(media, prompts, group, inputs)
        found, start = [], 0
        for piece in pieces:
            rows = slice(start, start + _length(piece))
            reasons = {i - rows.start: why for i, why in scores.reasons.items() if rows.start <= i < rows.stop}
            columns = {name: column[rows] for name, column in scores.parts.items()}
            found.append(Scores(scores.values[rows].detach().cpu(), reasons, columns))
            start = rows.stop
        return list(found)


def _finish(job: Job, rows: slice, scores: Scores) -> None:
    part = Part(list(range(rows.start, rows.stop)), job.request.media[:0], [], None, {})
    job.pieces.append((part, scores))
    if sum(len(part.rows) for part, _ in job.pieces) < job.count:
        return
    with suppress(InvalidStateError):  # nobody may wait for it any more
        job.future.set_result(joined(*zip(*job.pieces, strict=True)))


def _length(piece: Piece) -> int:
    return piece[1].stop - piece[1].start


def _shapes(request: Request) -> Any:
    """Properties that must be equal for two requests to be scored together."""
    tensors = {name: value for name, value in request.inputs.items() if isinstance(value, Tensor)}
    return (tuple(request.media.shape[1:]), *sorted(request.inputs), *(tuple(t.shape[1:]) for t in tensors.values()))


def _cat(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]
