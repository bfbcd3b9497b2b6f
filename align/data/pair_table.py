"""Tables of preferences or scores -> rows to train a reward or a generator on. No torch; no image is opened here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from align.data.prompts import PAIR, Prompt, read_table
from align.data.tables import is_tie
from alignflow.errors import DataError

if TYPE_CHECKING:
    from align.config.sources import PairsRollout, SamplesRollout


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

    @property
    def rejected_text(self) -> str:
        """The prompt of the rejected sample, another one where a pair is formed across prompts."""
        return str(self.prompt.metadata.get("rejected_prompt") or self.prompt.text)


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
    if prompt.metadata.get("rejected_prompt") in (None, prompt.text):  # else one image may fit one of two prompts
        check_two(prompt, PAIR)
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


def labels_of(rows: Sequence[Judged], names: Sequence[str], needed: bool = True) -> list[list[list[float]]]:
    """Numbers in the columns chosen_score.NAME and rejected_score.NAME: of both sides, for every row, for every name.

    NaN if a cell is empty.

    Args:
        needed: whether every name must have a number in some row.

    Raises:
        DataError: a cell holds something else, or one of the names has no number in any row.
    """
    sides = [[[_label(row.prompt, f"{side}_score.{name}") for name in names] for row in rows] for side in PAIR]
    for place, name in enumerate(names):
        if needed and all(math.isnan(row[place]) for side in sides for row in side):
            raise DataError(f'no row has a number under "chosen_score.{name}" or "rejected_score.{name}"')
    return sides


def _label(prompt: Prompt, name: str) -> float:
    return math.nan if prompt.metadata.get(name) in (None, "") else _number(prompt, name, "a label is")


def numbered(rows: Sequence[Judged], users: Sequence[str]) -> list[int]:
    """Number of each row's user; DataError for one that is not among ``users``."""
    place = {name: number for number, name in enumerate(users)}
    for row in rows:
        if row.user not in place:
            raise DataError(
                f"{row.prompt.where}: user {row.user!r} is not among the {len(users)} of the training table"
            )
    return [place[row.user] for row in rows]


# -- training a generator ---------------------------------------------------------------------------------------------


def stored_rewards(prompt: Prompt, rollout: PairsRollout | SamplesRollout, any_order: bool = False) -> list[float]:
    """Rewards of the samples of a stored row, as its columns say; arguments and DataError as :func:`pair_scores`."""
    if rollout.kind == "pairs":
        return pair_scores(prompt, rollout.columns, rollout.dimension, any_order)
    return [_number(prompt, "reward", "rollout.by_reward needs")] if rollout.by_reward else [1.0]


def pair_scores(
    prompt: Prompt, columns: Sequence[str], dimension: str | None = None, any_order: bool = False
) -> list[float]:
    """Scores of the samples of a stored pair, whose files are in the two ``columns``.

    They are in the columns ``chosen_score`` and ``rejected_score``. Without scores they are 1 and 0.

    Args:
        dimension: of the scores in ``chosen_score.NAME`` and ``rejected_score.NAME``, by which the rejected sample may
            be the better one.
        any_order: whether scores may be equal, and contradict the order of the pair.

    Raises:
        DataError: names the place of a score that is missing, is not a number, or contradicts the preference, and of a
            pair that prefers nothing of one prompt: of the same file twice, or across prompts.
    """
    _check_preference(prompt, columns)
    names = [f"{name}_score{'.' + dimension if dimension else ''}" for name in columns]
    if dimension is None and not any(prompt.metadata.get(name) is not None for name in names):
        return [1.0, 0.0]
    says = f"rollout.dimension {dimension} needs" if dimension else "a pair with scores has"
    won, lost = (_number(prompt, name, says) for name in names)
    if not any_order and (won == lost or (won < lost and dimension is None)):
        better = "differ from" if dimension else "be higher than"
        raise DataError(f"{prompt.where}: {names[0]} {won:g} should {better} {names[1]} {lost:g}")
    return [won, lost]


def _check_preference(prompt: Prompt, columns: Sequence[str]) -> None:
    check_two(prompt, columns)
    if prompt.metadata.get("rejected_prompt") not in (None, prompt.text):
        raise DataError(f"{prompt.where}: a pair across prompts trains a reward, not a generator (rejected_prompt)")


def check_two(prompt: Prompt, columns: Sequence[str]) -> None:
    """Raise DataError for a pair of one file with itself."""
    files = [prompt.media.get(name) for name in columns]
    if files[0] is not None and files[0] == files[1]:
        raise DataError(f"{prompt.where}: chosen and rejected are the same file")


def _number(prompt: Prompt, name: str, says: str) -> float:
    """The finite number under ``name`` in a prompt's row; DataError otherwise."""
    value = prompt.metadata.get(name)
    # an int may have any number of digits
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e308 < value < 1e308:
        raise DataError(f'{prompt.where}: {says} a number under "{name}", given {value!r:.80}')
    return float(value)
