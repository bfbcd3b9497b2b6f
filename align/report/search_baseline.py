"""A search against best-of-N with the same network calls: differences prompt by prompt, and the costs of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.report.changes import Change
from align.report.facts import duration

Row = dict[str, Any]
COSTS = ("network_calls", "reward_calls", "decodes", "backward_calls", "seconds")


@dataclass(frozen=True)
class Baseline:
    """Best-of-N beside the search.

    Args:
        changes: each gold, then the reward, from best-of-N (before) to the search (after).
        costs: label, and the cost of a prompt for best-of-N and for the search.
        calls: network calls of a prompt for both, as text.
    """

    changes: list[Change]
    costs: list[tuple[str, list[str]]]
    calls: tuple[str, str]

    @property
    def main(self) -> Change:
        """The change that the page judges by."""
        return self.changes[0]

    @property
    def sentence(self) -> str:
        """Result of the comparison in one sentence."""
        one = self.main
        name = one.name if one.role == "gold" else "the reward"
        verb = {"up": "is higher", "down": "is lower", "same": "is equal"}.get(
            one.direction, "shows no clear difference"
        )
        ends = f"{one.value(one.before)} with best-of-N, {one.value(one.after)} with the search"
        interval = f", 95 % interval {bounds(one)}" if one.interval else ""
        baseline, search = self.calls
        spent = f"At {baseline} network calls a prompt"
        if baseline != search:
            spent = f"With {baseline} network calls a prompt for best-of-N and {search} for the search"
        return f"{spent}, {name} {verb}: {ends} ({one.value(one.delta, signed=True)}{interval})."


def bounds(change: Change) -> str:
    """``+0.01 to +0.05``; a dash where there is no interval."""
    if change.interval is None:
        return "\N{EN DASH}"
    low, high = (change.value(end, signed=True) for end in change.interval)
    return f"{low} to {high}"


def baseline_of(summary: Row, rows: Sequence[Row]) -> Baseline | None:
    """Best-of-N against the search; None if it was not run, or no prompt has a score with both."""
    if "best_of_n" not in summary:
        return None
    pairs = [
        ("gold", name, [(row["gold"][name]["best_of_n"], row["gold"][name]["best"]) for row in rows])
        for name in summary["gold"]
    ]
    pairs.append(("reward", "reward", [(row["best_of_n"]["reward"], row["reward"]) for row in rows]))
    known = [(role, name, [both for both in some if None not in both]) for role, name, some in pairs]
    found = [Change.of_pairs(role, name, some) for role, name, some in known if some]
    if not found:
        return None
    spent = summary["best_of_n"]["spent"], summary["spent"]
    costs = [
        (name.replace("_", " ") if name != "seconds" else "time", [_said(name, one.get(name, 0.0)) for one in spent])
        for name in COSTS
        if any(one.get(name) for one in spent)
    ]
    first, second = (_said("network_calls", one.get("network_calls", 0.0)) for one in spent)
    return Baseline(found, costs, (first, second))


def _said(name: str, value: float) -> str:
    return duration(value) if name == "seconds" else f"{value:,.1f}".removesuffix(".0")
