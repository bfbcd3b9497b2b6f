"""Tables of rewrites and their scores. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.data.files import without_nan
from align.data.tables import read_rows
from alignflow.errors import DataError

if TYPE_CHECKING:
    from align.data.prompts import Prompt


PART = "score."


@dataclass
class Judged:
    """Scores of a rewrite: means over its samples by name of the reward; NaN if one is missing, with the reason.

    ``invalid`` says that the rewrite itself is at fault: it is empty, or too long for the generator.
    """

    scores: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    invalid: bool = False

    @property
    def score(self) -> float:
        """The reward's."""
        return self.scores.get("reward", float("nan"))


def row_of(prompt: Prompt, text: str, judged: Judged, **about: Any) -> dict[str, Any]:
    """A row: ``prompt`` is the user's, ``score`` of the rendered rewrite is null with a reason where it is missing."""
    row = {"prompt": prompt.text, "rewrite": text, "score": judged.score, "parts": judged.parts, **about}
    return without_nan({**row, **({"reason": judged.reason} if judged.reason else {})})  # type: ignore[no-any-return]


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a table whose cells are plain: a column ``score.NAME`` for every part."""
    plain = {key: value for key, value in row.items() if not isinstance(value, dict)}
    return {**plain, **{f"{PART}{name}": value for name, value in row["parts"].items()}}


@dataclass(frozen=True)
class Scored:
    """A rewrite of a prompt with its score, NaN if it has none, and the score's parts."""

    prompt: str
    rewrite: str
    score: float
    parts: dict[str, float]


def read_rewrites(source: str) -> list[Scored]:
    """Rows of a table with columns prompt, rewrite, score and optionally parts, or a column score.NAME for each part.

    Raises:
        DataError: missing, empty, or a row without these; names the row and the column.
    """
    found = []
    for place, row in read_rows(source):
        for name in ("prompt", "rewrite"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise DataError(f'{place}: needs a text under "{name}"; alignflow prompts evolve writes such a table')
        columns = {name.removeprefix(PART): value for name, value in row.items() if name.startswith(PART)}
        parts = row.get("parts") or columns
        if not isinstance(parts, dict):
            raise DataError(f'{place}: "parts" should map names to numbers, given {parts!r:.60}')
        numbers = {name: _number(value, name, place) for name, value in {**parts, "score": row.get("score")}.items()}
        found.append(Scored(row["prompt"], row["rewrite"], numbers.pop("score"), numbers))
    if not found:
        raise DataError(f"{source} holds no rewrites")
    return found


def _number(value: Any, name: str, place: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f'{place}: "{name}" should be a number, given {value!r:.60}')
    return float(value)


def wanted_text(prompt: Prompt, column: str) -> str:
    """Reference text of a prompt; DataError if its row has none."""
    found = prompt.metadata.get(column)
    if not isinstance(found, str) or not found.strip():
        raise DataError(f'{prompt.where}: needs a text under "{column}", which caption.column names')
    return found


def lines(rows: Iterable[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(without_nan(row), ensure_ascii=False) + "\n" for row in rows)


def compared(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Name of a reward -> means of the plain prompts and of the best rewrites, on noise that chose neither."""
    pairs = [row["again"] for row in rows if row.get("best")]
    found = {}
    for name in sorted({name for pair in pairs for name in pair["plain"]}):
        both = [(pair["plain"].get(name), pair["best"].get(name)) for pair in pairs]
        known = [(a, b) for a, b in both if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
        means = [sum(side) / len(known) for side in zip(*known, strict=True)] if known else [math.nan] * 2
        found[name] = {"plain": means[0], "best": means[1]}
    return found or {"reward": {"plain": math.nan, "best": math.nan}}


def mean_scores(judged: Sequence[Judged]) -> dict[str, float]:
    """Mean of each reward over what has a score, and the number of rewrites that have none."""
    names = sorted({"reward"}.union(*(one.scores for one in judged)))
    columns = {name: [one.scores.get(name, math.nan) for one in judged] for name in names}
    known = {name: [value for value in values if math.isfinite(value)] for name, values in columns.items()}
    means = {name: sum(values) / len(values) if values else math.nan for name, values in known.items()}
    return {**means, "missing": float(sum(not math.isfinite(one.score) for one in judged))}
