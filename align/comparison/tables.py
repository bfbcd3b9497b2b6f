"""Tables of a comparison: results, differences, settings and machines that differ, costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from align.comparison.arms import Arm
from align.comparison.matching import Difference, difference, result
from align.comparison.notes import ranked, result_mean
from align.report.changes import Change
from align.report.charts import GAP, short
from align.report.facts import duration
from align.report.intervals import mean
from align.runs.identity import flatten

MOST_SETTINGS, MOST_PAIRS, WIDEST = 80, 15, 60
"""Rows of the table of settings, pairs of settings that are compared, characters of a value."""
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("time", duration),
    "steps": ("training steps", lambda value: f"{value:,.0f}"),
    "samples": ("training samples", lambda value: f"{value:,.0f}"),
    "training_calls": ("network calls of training", lambda value: f"{value:,.0f}"),
    "network_calls": ("network calls with evaluations", lambda value: f"{value:,.0f}"),
    "memory_gb": ("peak GPU memory", lambda value: f"{value:.1f} GB"),
    "seconds a prompt": ("time a prompt", duration),
}
"""Cost -> its name and how it is written; others are written as they are."""


@dataclass(frozen=True)
class Result:
    """One score of one setting: the mean at the end, and the change where it was measured before as well."""

    arm: Arm
    value: float
    change: Change | None

    @property
    def after(self) -> str:
        """The mean at the end, as it is shown."""
        return self.change.value(self.change.after) if self.change else short(self.value)

    @property
    def over(self) -> str:
        """Units over which the interval of the change is computed."""
        several = len(self.arm.entries) > 1
        if self.change is None or self.change.interval is None:
            return ""
        return (
            f"{len(self.arm.entries)} seeds"
            if several
            else f"{self.change.pairs:,} prompts"
            if self.change.pairs
            else "means"
        )


@dataclass(frozen=True)
class Score:
    """One held-out score: the result of every setting that has it, and the differences between them."""

    name: str
    results: list[Result]
    differences: list[Difference]
    reasons: list[str]


def score(arms: Sequence[Arm], name: str) -> Score:
    """Every pair of settings, or every one against the first where there are too many pairs."""
    having = [arm for arm in arms if arm.first.mean(name) is not None]
    pairs = [(a, b) for place, a in enumerate(having) for b in having[place + 1 :]]
    if len(pairs) > MOST_PAIRS:
        pairs = [(having[0], other) for other in having[1:]]
    found = [difference(a, b, name) for a, b in pairs]
    ends = [(arm, result_mean(arm, name)) for arm in having]
    results = [Result(arm, value, result(arm, name)) for arm, value in ends if value is not None]
    told = [one for one in found if isinstance(one, str)]
    return Score(name, results, [one for one in found if not isinstance(one, str)], list(dict.fromkeys(told)))


def settings(arms: Sequence[Arm]) -> tuple[list[tuple[str, list[str]]], int]:
    """Dotted key and its value in every setting, where they differ; and how many rows were left out."""
    trees = [arm.settings() for arm in arms]
    return _different(trees)


def machines(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Versions and machines that differ; of a setting with several seeds those of its first run."""
    trees = [{key: value for key, value in flatten(arm.first.environment).items() if key != "command"} for arm in arms]
    return _different(trees)[0]


def _different(trees: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, list[str]]], int]:
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    told = [(key, [_value(tree[key]) if key in tree else GAP for tree in trees]) for key in keys]
    rows = [(key, values) for key, values in told if len(set(values)) > 1]
    return rows[:MOST_SETTINGS], max(0, len(rows) - MOST_SETTINGS)


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def costs(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Name and value with every setting, means over its runs; rows without any value are left out."""
    keys = dict.fromkeys([*COSTS, *(key for arm in arms for one in arm.entries for key in one.costs)])
    rows = []
    for key in keys:
        columns = [[one.costs[key] for one in arm.entries if key in one.costs] for arm in arms]
        if any(columns):
            label, written = COSTS.get(key, (key.replace("_", " "), short))
            rows.append((label, [written(mean(column)) if column else GAP for column in columns]))
    return rows


def lines(arms: Sequence[Arm], scores: Sequence[Score]) -> list[tuple[list[str], list[list[str]]]]:
    """Head and rows of the terminal's tables: results, differences, costs."""
    tables = []
    for one in scores:
        order = [arm.label for arm in ranked(arms, one.name)]
        rows = [_result_row(row) for row in sorted(one.results, key=lambda row: order.index(row.arm.label))]
        tables.append(([one.name, "runs", "before", "after", "change", "95 % interval"], rows))
        if one.differences:
            head = [f"difference in {one.name}", "", "over prompts", "over seeds"]
            tables.append((head, [_difference_row(row) for row in one.differences]))
    if spent := costs(arms):
        tables.append((["cost of a run", *(arm.label for arm in arms)], [[label, *values] for label, values in spent]))
    return tables


def _result_row(row: Result) -> list[str]:
    change, runs = row.change, str(len(row.arm.entries))
    if change is None:
        return [row.arm.label, runs, GAP, row.after, GAP, GAP]
    told = interval(change)
    ends = [change.value(change.before), change.value(change.after), change.value(change.delta, True)]
    return [row.arm.label, runs, *ends, f"{told} ({row.over})" if row.over else told]


def _difference_row(row: Difference) -> list[str]:
    prompts = f"{interval(row.prompts)}" + (f" ({row.prompts.pairs})" if row.prompts.pairs else "")
    seeds = GAP if row.seeds is None else interval(row.seeds)
    amount = row.prompts.value(row.prompts.delta, True)
    return [f"{row.second.label} \N{MINUS SIGN} {row.first.label}", amount, prompts, seeds]


def interval(change: Change) -> str:
    """``+0.01 to +0.05``; a dash if there is none."""
    if change.interval is None:
        return GAP
    return " to ".join(change.value(end, True) for end in change.interval)
