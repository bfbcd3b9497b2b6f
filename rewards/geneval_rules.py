"""GenEval's rules on plain lists of boxes (arXiv 2310.11513), and Flow-GRPO's dense and strict scores. No torch.

GenEval reads "count" as at least, and lets only ``exclude`` forbid more; it looks at the surest ``count`` objects of a
class. Flow-GRPO reads it as exactly, and looks at all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from rewards.networks.detector import Box, Found

THRESHOLD, COUNTING_THRESHOLD, MOST, MARGIN = 0.3, 0.9, 16, 0.1
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

Colours = Callable[[str, "Sequence[Found]"], list[str]]
"""``(class, objects) -> the colour of each``."""


@dataclass(frozen=True)
class Clause:
    """A number of objects of a class, their colour, and their position relative to the objects of an earlier clause."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


class Task(NamedTuple):
    """Request of a prompt; ``tag`` is GenEval's kind of task."""

    include: list[Clause]
    exclude: list[Clause]
    tag: str = ""

    @property
    def threshold(self) -> float:
        """Score above which an object counts."""
        return COUNTING_THRESHOLD if self.tag == "counting" else THRESHOLD


class Verdict(NamedTuple):
    """``published`` is GenEval's own 0 or 1, ``strict`` that with exact counts, ``dense`` the mean over demands."""

    published: float
    strict: float
    dense: float


def read_task(include: Sequence[Any], exclude: Sequence[Any], tag: str = "") -> Task:
    """GenEval's metadata, checked.

    Raises:
        ValueError: an entry is not one of GenEval's; the message names it.
    """
    if not include:
        raise ValueError("include is empty: there is nothing to check")
    read = [_clause(f"include[{i}]", entry, i) for i, entry in enumerate(include)]
    return Task(read, [_clause(f"exclude[{i}]", entry, 0) for i, entry in enumerate(exclude)], tag)


def judge(objects: Mapping[str, Sequence[Found]], task: Task, colours: Colours) -> Verdict:
    """All three scores of one image.

    Args:
        objects: class -> those above :attr:`Task.threshold`, the surest first; 16 of each count.
        colours: asked only where a colour is to be judged.
    """
    seen = {name: list(found[:MOST]) for name, found in objects.items()}
    published, _ = _included(seen, task, colours, "at least")
    published &= all(len(seen.get(clause.name, [])) < clause.count for clause in task.exclude)
    strict, demands = _included(seen, task, colours, "exactly")
    return Verdict(float(published), float(strict), sum(demands) / len(demands))


def relations(first: Box, second: Box) -> set[str]:
    """Position of ``first`` relative to ``second``: none, one or two of :data:`RELATIONS`.

    The offset of the centres is shortened on each axis by a tenth of both boxes' extents there, and divided by its
    unshortened length; above 1/2 it is a relation.
    """
    offset = [(first[i] + first[i + 2] - second[i] - second[i + 2]) / 2 for i in (0, 1)]
    extents = [first[i + 2] - first[i] + second[i + 2] - second[i] for i in (0, 1)]
    short = [math.copysign(max(abs(o) - MARGIN * e, 0.0), o) for o, e in zip(offset, extents, strict=True)]
    if max(map(abs, short)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offset) for value in short)
    holds = dict(zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True))
    return {name for name, true in holds.items() if true}


def _included(
    objects: Mapping[str, Sequence[Found]], task: Task, colours: Colours, count: Literal["at least", "exactly"]
) -> tuple[bool, list[float]]:
    """Whether every clause of ``include`` holds, and Flow-GRPO's mark for each demand."""
    groups: list[Sequence[Found] | None] = []
    marks: list[float] = []
    for clause in task.include:
        found = objects.get(clause.name, [])
        marks.append(1 - abs(clause.count - len(found)) / clause.count)
        if count == "at least":
            found = found[: clause.count]
        holds = len(found) == clause.count
        if not holds and (clause.colour or clause.position):
            marks.append(0.0)
        if holds and clause.colour:
            right = colours(clause.name, found).count(clause.colour)
            marks.append(1 - abs(clause.count - right) / clause.count)
            holds = right == clause.count
        if holds and clause.position:
            holds = _placed(found, groups[clause.position[1]], clause.position[0])
            marks.append(float(holds))
        groups.append(found if holds else None)
    return all(group is not None for group in groups), marks


def _placed(found: Sequence[Found], target: Sequence[Found] | None, relation: str) -> bool:
    return target is not None and all(relation in relations(a.box, b.box) for a in found for b in target)


def _clause(where: str, entry: Any, earlier: int) -> Clause:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} should be a mapping with class and count, is {entry!r}")
    name, count, colour, position = (entry.get(key) for key in ("class", "count", "color", "position"))
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} names no class: {dict(entry)!r}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{where}: count should be 1 or more, is {count!r}")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"{where}: color {colour!r} is not one of {', '.join(COLOURS)}")
    if position is None:
        return Clause(name, count, colour)
    good = isinstance(position, Sequence) and len(position) == 2 and position[0] in RELATIONS
    if not good or position[1] not in range(earlier):
        said = f"one of {', '.join(RELATIONS)} and the number of an earlier clause"
        raise ValueError(f"{where}: position should be {said}, is {position!r}")
    return Clause(name, count, colour, (position[0], position[1]))
