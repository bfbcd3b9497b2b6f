"""Tables of preferences or scores -> rows to train a reward on. No torch; no image is opened here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from align.data.prompts import PAIR, Prompt, read_table
from align.data.tables import is_tie
from alignflow.errors import DataError


@dataclass(frozen=True, eq=False)
class Judged:
    """One row.

    Args:
        outcome: of a pair 1 = chosen is better, 0 = tie; of a single image its score.
        user: who judged, or "" where the table does not say.
    """

    prompt: Prompt
    outcome: float
    user: str


def read_judged(source: str, *, single: bool = False, limit: int | None = None) -> list[Judged]:
    """Rows of a table.

    Args:
        single: rows of one image with its number (prompt, image, score) in place of pairs.

    Raises:
        DataError: not there, empty, or without what is needed; names row and column.
    """
    rows = islice(read_table(source, ("image",) if single else PAIR), limit)
    found = [_judged(prompt, single) for prompt in rows]
    if not found:
        raise DataError(f"{source} holds no rows")
    return found


def _judged(prompt: Prompt, single: bool) -> Judged:
    user = prompt.metadata.get("user")
    name = "" if user is None else str(user)
    if single:
        return Judged(prompt, _score(prompt), name)
    return Judged(prompt, 0.0 if is_tie(prompt.metadata.get("tie"), prompt.where) else 1.0, name)


def _score(prompt: Prompt) -> float:
    given: Any = prompt.metadata.get("score")
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f'{prompt.where}: "score" should be a number, given {given!r:.40}')
    return value


def numbered(rows: Sequence[Judged], users: Sequence[str]) -> list[int]:
    """Number of each row's user; DataError for one that is not among ``users``."""
    place = {name: number for number, name in enumerate(users)}
    for row in rows:
        if row.user not in place:
            raise DataError(f"{row.prompt.where}: user {row.user!r} is not among the {len(users)} to learn from")
    return [place[row.user] for row in rows]
