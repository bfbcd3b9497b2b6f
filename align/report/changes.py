"""Held-out scores before and after training: which exist, how they relate to the training, how they changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.report.charts import MINUS
from align.report.intervals import mean, standard_error, t95
from align.report.reading import Run, number

Relation = Literal["trained", "part", "other", "unknown"]
PARTS = "reward/"
"""Held-out scores of a mixture's members are called after it."""


MANY = 20
"""Equal differences that are certain without an interval."""


@dataclass(frozen=True)
class Change:
    """A held-out score at two evaluations, with the 95 % interval of the difference where it is known.

    Args:
        role: ``gold``, ``reward`` or ``other``.
        name: of the score.
        before, after: means over the prompts.
        error: standard error of the difference; None if it is not known.
        pairs: prompts that were compared one by one; None if only the two means are known.
        steps: of both evaluations; None if only the summary is left.
        limits: lowest and highest possible score.
        freedom: degrees of freedom of ``error``.
    """

    role: str
    name: str
    before: float
    after: float
    error: float | None
    pairs: int | None = None
    steps: tuple[float, float] | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)
    freedom: float | None = None

    @classmethod
    def of_pairs(cls, role: str, name: str, pairs: Sequence[tuple[float, float]], **about: Any) -> Change:
        """From (before, after) of at least one prompt or run; ``error`` is that of the mean of the differences."""
        before, after = (mean([pair[side] for pair in pairs]) for side in (0, 1))
        error = standard_error([end - start for start, end in pairs])
        return cls(role, name, before, after, error, len(pairs), freedom=len(pairs) - 1, **about)

    @property
    def delta(self) -> float:
        return self.after - self.before

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the difference, within its limits; None if its error is unknown or 0."""
        if not self.error:
            return None
        reach = t95(self.freedom) * self.error
        most = self.limits[1] - self.limits[0]
        return max(self.delta - reach, -most), min(self.delta + reach, most)

    @property
    def direction(self) -> str:
        """``up`` or ``down`` where the interval excludes zero, else ``unsure``; ``same`` where nothing changed at all.

        Many equal differences are certain, a few are not: three seeds may agree by chance.
        """
        if self.error == 0 and self.delta == 0:
            return "same"
        if self.error is None or (self.error == 0 and self.pairs is not None and self.pairs < MANY):
            return "unsure"
        low, high = self.interval or (self.delta, self.delta)
        return "up" if low > 0 else "down" if high < 0 else "unsure"

    @property
    def tone(self) -> str:
        """Name of its colour in the style sheet."""
        return self.direction if self.direction in ("up", "down") else "unsure"

    def value(self, number: float, signed: bool = False) -> str:
        """Both ends and the difference with equally many decimals; zero has no sign."""
        top = max(abs(self.before), abs(self.after))
        decimals = min(4, max(0, 2 - math.floor(math.log10(top)))) if top else 3
        rounded = round(number, decimals) or 0.0
        return f"{rounded:{'+' if signed and rounded else ''},.{decimals}f}".replace("-", MINUS)


def score_name(run: Run, role: str) -> str | None:
    """The held-out score that plays a role: what ``evaluate.gold`` names, or ``reward``, what was trained on."""
    name = (run.section("evaluate").get("gold") or "gold") if role == "gold" else "reward"
    return name if name in run.score_names() else None


def relation(run: Run, name: str) -> Relation:
    """Whether the training optimised a held-out score: by what the config says, or by equal numbers without one."""
    if name == "reward":
        return "trained"
    trained, own = run.config.get("reward"), run.section("evaluate").get("rewards")
    if name.startswith(PARTS):
        return "part"
    settings = own.get(name) if isinstance(own, dict) else None
    if not isinstance(trained, dict) or not isinstance(settings, dict):
        alike = "reward" in run.score_names() and run.held_out(name) == run.held_out("reward")
        none_trained = isinstance(settings, dict) and run.config.get("reward", 0) is None
        return "trained" if alike else "other" if none_trained else "unknown"
    if settings == trained:
        return "trained"
    return "part" if any(settings == inner for inner in _mappings(trained)) else "other"


def trained_on_gold(run: Run) -> bool:
    """Whether gold is the trained reward."""
    gold = score_name(run, "gold")
    return gold is not None and relation(run, gold) == "trained"


def repeated(run: Run) -> set[str]:
    """Held-out scores whose numbers another one has already, which a caption leaves out."""
    gold, names = score_name(run, "gold"), run.score_names()
    ordered = [*([gold] if gold else []), *(name for name in names if name != gold)]
    curves = [run.held_out(name) for name in ordered]
    return {name for place, name in enumerate(ordered) if curves[place] in curves[:place]}


def members(run: Run) -> list[str]:
    """Held-out scores that the trained reward is made of; of several with the same numbers, gold or the first."""
    parts = [name for name in run.score_names() if relation(run, name) == "part"]
    gold = score_name(run, "gold")
    seen, found = [run.held_out(gold)] if gold else [], []
    for name in sorted(parts, key=lambda name: not name.startswith(PARTS)):
        curve = run.held_out(name)
        if name == gold or curve not in seen:
            seen.append(curve)
            found.append(name)
    return found


def comparable(run: Run) -> bool:
    """Whether the trained reward has a held-out score that can be compared from one evaluation to the next.

    A reward whose samples are normalised against each other has mean 0 whatever the policy does.
    """
    names = run.score_names()
    if "reward" not in names and any(name.startswith(PARTS) for name in names):
        return False
    return not any(one.get("normalise") in ("group", "batch") for one in _mappings(run.config.get("reward")))


def _mappings(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside a tree of settings."""
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        if isinstance(value, dict):
            yield value
        yield from _mappings(value)


def change(run: Run, role: str) -> Change | None:
    """Gold or reward at the first and the last evaluation; None before there are two."""
    name = score_name(run, role)
    found = change_of(run, name, role) if name else None
    return found or (_told(run, role, name) if len(run.evals) != 1 else None)


def change_of(run: Run, name: str, role: str = "other") -> Change | None:
    """Any held-out score at the first and the last evaluation that has it."""
    steps, values = run.held_out(name)
    known = [step for step, value in zip(steps, values, strict=True) if value is not None]
    return between(run, name, int(known[0]), int(known[-1]), role) if len(known) > 1 else None


def between(run: Run, name: str, first: int, last: int, role: str = "other") -> Change | None:
    """A held-out score at two steps: prompt by prompt where the run kept that, else from the two means."""
    limits, pairs = run.limits(name), run.paired(name, first, last)
    if pairs:
        return Change.of_pairs(role, name, pairs, steps=(first, last), limits=limits)
    rows = {row["step"]: row for row in run.evals}
    ends_of = [
        {part: number((rows[step].get(part) or {}).get(name)) for part in ("scores", "stderr")}
        for step in (first, last)
    ]
    counts = [number(rows[step].get("prompts")) for step in (first, last)]
    before, after = ends_of[0]["scores"], ends_of[1]["scores"]
    if before is None or after is None:
        return None
    freedom = None if None in counts else sum(count - 1 for count in counts if count)
    error = _joined(ends_of[0]["stderr"], ends_of[1]["stderr"])
    return Change(role, name, before, after, error, None, (first, last), limits, freedom)


def _told(run: Run, role: str, name: str | None) -> Change | None:
    """From the summary, where the rows are lost."""
    ends = [number(run.summary.get(f"{role}_{end}")) for end in ("before", "after")]
    if ends[0] is None or ends[1] is None:
        return None
    spread = [number(run.summary.get(f"{role}_{end}_stderr")) for end in ("before", "after")]
    return Change(role, name or role, ends[0], ends[1], _joined(spread[0], spread[1]))


def _joined(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else math.hypot(before, after)
