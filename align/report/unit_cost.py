"""Cost of a unit of gain in a held-out score: the training steps that brought the gain, divided by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from align.report.changes import Change
from align.report.facts import duration
from align.report.reading import Row, Run, number


@dataclass(frozen=True)
class UnitCost:
    """Cost per unit of a score.

    Args:
        name: of the score in a sentence: ``gold`` or ``the trained reward``.
        gain: as text, with its sign.
        values: label, cost per unit, and its 95 % interval, which is empty where the gain has none.
        reason: why the cost is not divided by the gain; empty where it is.
    """

    name: str
    gain: str
    values: list[tuple[str, str, str]] = field(default_factory=list)
    reason: str = ""


def unit_cost(run: Run, compared: Sequence[Change]) -> UnitCost | None:
    """Cost per unit of gold, or of the trained reward without gold; None where no cost or neither score is known.

    Evaluations are not counted: their number depends on ``evaluate.every``, not on the training.

    Args:
        compared: the changes at the head of the page.
    """
    ranked = sorted((one for one in compared if one.role in ("gold", "reward")), key=lambda one: one.role)
    if not ranked or ranked[0].steps is None:
        return None
    change = ranked[0]
    spent = _spent(run, *ranked[0].steps)
    if not spent:
        return None
    name = "gold" if change.role == "gold" else "the trained reward"
    if change.direction != "up":
        return UnitCost(name, "", reason=_reason(change, name))
    values = [(label, said(cost / change.delta), _range(cost, change, said)) for label, cost, said in spent]
    return UnitCost(name, change.value(change.delta, signed=True), values)


Said = Callable[[float], str]


def _spent(run: Run, first: float, last: float) -> list[tuple[str, float, Said]]:
    """Label, sum over the training steps after ``first`` up to ``last``, and how it is written."""
    rows = [row for row in run.train if first < row["step"] <= last]
    online = run.section("rollout").get("kind", "online") == "online"
    columns: list[tuple[str, Callable[[Row], float | None], Said]] = [
        ("network calls", lambda row: number(row.get("network_calls")), _count),
        ("samples scored" if online else "samples trained on", lambda row: number(row.get("samples")), _count),
        ("time", _seconds, _time),
    ]
    found = []
    for label, of, said in columns:
        known = [value for row in rows if (value := of(row)) is not None]
        if known and len(known) == len(rows) and sum(known) > 0:
            found.append((label, sum(known), said))
    return found


def _seconds(row: Row) -> float | None:
    """Seconds of one training step, of all its phases."""
    phases = row.get("time")
    values = [number(value) for value in phases.values()] if isinstance(phases, dict) else []
    return None if not values or None in values else sum(value for value in values if value is not None)


def _range(cost: float, change: Change, said: Said) -> str:
    if change.interval is None:
        return ""
    low, high = change.interval
    return f"{said(cost / high)} to {said(cost / low)}"


def _reason(change: Change, name: str) -> str:
    if change.direction == "unsure":
        known = change.interval is not None
        about = "the interval of its change includes zero" if known else "the certainty of its change is unknown"
    else:
        about = "it did not change" if change.direction == "same" else "it fell"
    return f"There is no cost per unit of {name}: {about}, so there is no gain to divide by."


def _count(value: float) -> str:
    """Three digits, as the interval has no more."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 10 else f"{value:.3g}"


def _time(seconds: float) -> str:
    return duration(float(f"{seconds:.3g}"))
