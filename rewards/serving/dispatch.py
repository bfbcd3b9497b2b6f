"""Scoring elsewhere: samples in parts, several at once, tried again after a pause, given up with a reason."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignflow.secrets import shown
from rewards.base import Scope, Scores
from rewards.combine import groups_of

logger = logging.getLogger(__name__)
LONGEST_PAUSE = 30.0


class UnansweredError(Exception):
    """A part was not scored.

    Args:
        why: for people.
        again: whether another attempt may help.
    """

    def __init__(self, why: str, again: bool = True) -> None:
        super().__init__(shown(why))
        self.again = again


@dataclass(frozen=True)
class Part:
    """Samples ``rows`` of a larger call, with all that belongs to them."""

    rows: list[int]
    media: Tensor
    prompts: list[str]
    group: Tensor | None
    inputs: dict[str, Any]


def parts_of(
    media: Tensor,
    prompts: Sequence[str],
    group: Tensor | None,
    inputs: Mapping[str, Any],
    scope: Scope,
    size: int,
) -> list[Part]:
    """Parts of about ``size`` samples; what must be scored together stays together."""
    count = len(prompts)
    if scope == "batch":
        chunks = [list(range(count))]
    elif scope == "sample":
        chunks = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    else:
        members: dict[int, list[int]] = {}
        for row, number in enumerate(groups_of(prompts, group).tolist()):
            members.setdefault(number, []).append(row)
        chunks = [[]]
        for rows in members.values():
            if chunks[-1] and len(chunks[-1]) + len(rows) > size:
                chunks.append([])
            chunks[-1] += rows
    return [_part(rows, media, prompts, group, inputs) for rows in chunks if rows]


def _part(
    rows: list[int], media: Tensor, prompts: Sequence[str], group: Tensor | None, inputs: Mapping[str, Any]
) -> Part:
    some = {
        name: value[rows] if isinstance(value, Tensor) else [value[i] for i in rows] for name, value in inputs.items()
    }
    return Part(rows, media[rows], [prompts[i] for i in rows], None if group is None else group[rows], some)


@dataclass
class Dispatcher:
    """Has parts scored by ``ask`` and puts their scores in order; :meth:`each` does so with anything that is asked.

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

    def __call__(self, parts: Sequence[Part]) -> Scores:
        """Scores of all samples; NaN with the reason for those of a part that was given up."""
        return joined(parts, self.each(parts, lambda part, why: nothing(len(part.rows), why)))

    def each(self, parts: Sequence[Any], give_up: Callable[[Any, str], Any]) -> list[Any]:
        """What ``ask`` makes of each part, or ``give_up(part, reason)``."""
        self.hopeless = False
        with ThreadPoolExecutor(min(self.parallel, max(len(parts), 1))) as pool:
            return list(pool.map(lambda part: self._insist(part, give_up), parts))

    def _insist(self, part: Any, give_up: Callable[[Any, str], Any]) -> Any:
        attempt = 1
        while True:
            try:
                found = self.ask(part)
            except UnansweredError as error:
                if not error.again or self.hopeless or attempt > self.retries:
                    self.hopeless = error.again
                    tried = f" ({attempt} attempts)" if attempt > 1 else ""
                    return give_up(part, f"{error}{tried}")
                pause = min(self.backoff * 2 ** (attempt - 1), LONGEST_PAUSE)
                logger.warning("%s; trying again in %g s", error, pause)
                time.sleep(pause)
                attempt += 1
            else:
                self.hopeless = False
                return found


def nothing(count: int, why: str) -> Scores:
    """No score for any of ``count`` samples, for the same reason."""
    return Scores(torch.full((count,), torch.nan), dict.fromkeys(range(count), why))


def joined(parts: Sequence[Part], scores: Sequence[Scores]) -> Scores:
    """Scores of parts as scores of the whole, each row in its place."""
    count = sum(len(part.rows) for part in parts)
    values = torch.full((count,), torch.nan)
    reasons: dict[int, str] = {}
    columns: dict[str, Tensor] = {}
    for part, found in zip(parts, scores, strict=True):
        values[part.rows] = found.values.detach().float().cpu()
        reasons |= {part.rows[index]: why for index, why in found.reasons.items()}
        for name, column in found.parts.items():
            whole = columns.setdefault(name, torch.full((count,), torch.nan))
            whole[part.rows] = column.detach().float().cpu()
    return Scores(values, reasons, columns)
