"""Best reward so far against each cost of a search, as means over the prompts at common budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.report.charts import Chart, Series
from align.report.figures import Figure

AXES = {"network_calls": "network calls", "reward_calls": "reward calls", "decodes": "decodes", "seconds": "seconds"}
POINTS = 48
"""Budgets of a curve at most."""
Row = dict[str, Any]
Curve = Sequence[Row]


def best_so_far(row: Row, method: str | None = None) -> list[Row]:
    """Costs of one prompt and the best reward by then: at no cost that of the plain sample, then each better one.

    Args:
        row: of a search's results.
        method: ``best_of_n`` for the baseline's; None for the search's own.
    """
    curve = (row if method is None else row[method])["curve"]
    if row["plain"] is None:
        return list(curve)
    costs = [name for name in (curve[0] if curve else AXES) if name != "reward"]
    return [{**dict.fromkeys(costs, 0), "reward": row["plain"]}, *curve]


def mean_curve(
    curves: Sequence[Curve], cost: str, at: Sequence[float] | None = None
) -> tuple[list[float], list[float | None]]:
    """Budgets, and the mean over the prompts of the best reward within each; a prompt keeps its best after its end.

    Args:
        at: budgets; None for :func:`budgets` of these curves.
    """
    if not curves:
        return [], []
    x = budgets(curves, cost) if at is None else list(at)
    best = [[max(point["reward"] for point in curve if point[cost] <= here + 1e-9) for curve in curves] for here in x]
    return x, [sum(values) / len(values) for values in best]


def budgets(curves: Sequence[Curve], cost: str) -> list[float]:
    """Costs at which a best reward changes, from where every prompt has one; evenly left out where there are many."""
    first = max(curve[0][cost] for curve in curves)
    every = sorted({point[cost] for curve in curves for point in curve if point[cost] >= first})
    if len(every) <= POINTS:
        return every
    return [every[round(i * (len(every) - 1) / (POINTS - 1))] for i in range(POINTS)]


def figures(rows: Sequence[Row], method: str) -> list[Figure]:
    """A card for each cost; best-of-N beside the method where the search was compared with it.

    Args:
        rows: prompts that have a score.
        method: kind of the search.
    """
    rows = [row for row in rows if best_so_far(row)]
    compared = bool(rows) and all("best_of_n" in row and best_so_far(row, "best_of_n") for row in rows)
    curves = {method: [best_so_far(row) for row in rows]}
    if compared:
        curves["best_of_n"] = [best_so_far(row, "best_of_n") for row in rows]
    tones = {method: "reward", "best_of_n": "calm d1"} if compared else {method: "reward"}
    both = [one for some in curves.values() for one in some]
    made: list[Figure] = []
    for name, label in AXES.items():
        x = budgets(both, name) if both and all(name in point for one in both for point in one) else []
        if len(x) < 2 or not (made or name == "network_calls"):
            continue
        series = [
            Series(kind, *mean_curve(some, name, x), tone=tones[kind], stepped=True) for kind, some in curves.items()
        ]
        note = "Best reward so far, the plain sample included, mean over prompts."
        chart = Chart(f"Reward against {label}", note, series, axis=label, unit="reward")
        made.append(Figure(chart.title, note, [chart], lead=not made))
    return made
