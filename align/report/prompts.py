"""Held-out scores per prompt: the largest gains and losses, and the change by kind of prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.report.changes import Change
from align.report.images import STRIP_SIDE, InlineImage, thumbnail
from align.report.reading import Run
from align.runs.per_prompt import PromptScores

MOST = 6
"""Prompts in each of the two lists."""

Both = tuple[PromptScores, PromptScores]


@dataclass(frozen=True)
class Moved:
    """One prompt whose score changed; images where the run kept its samples."""

    prompt: str
    kind: str | None
    before: str
    after: str
    delta: str
    images: tuple[InlineImage | None, InlineImage | None]


@dataclass(frozen=True)
class Kind:
    """The change of one kind of prompt."""

    name: str
    count: int
    change: Change


@dataclass(frozen=True)
class ByPrompt:
    """One score on the page, prompt by prompt.

    Args:
        counts: prompts that rose, fell and stayed.
    """

    name: str
    counts: tuple[int, int, int]
    gains: list[Moved]
    losses: list[Moved]
    kinds: list[Kind]
    steps: tuple[int, int]


def by_prompt(run: Run, change: Change | None) -> ByPrompt | None:
    """The score that the page judges by; None if it was not kept prompt by prompt."""
    if change is None or not change.pairs or change.steps is None:
        return None
    first, last = (int(step) for step in change.steps)
    both = [pair for pair in run.matched(first, last) if None not in (score(pair[0], change), score(pair[1], change))]
    ranked = sorted(both, key=lambda pair: _delta(pair, change))
    falling = [pair for pair in ranked if _delta(pair, change) < 0]
    rising = [pair for pair in reversed(ranked) if _delta(pair, change) > 0]
    counts = len(rising), len(falling), len(both) - len(rising) - len(falling)
    gains, losses = ([_moved(run, pair, change) for pair in some[:MOST]] for some in (rising, falling))
    return ByPrompt(change.name, counts, gains, losses, _kinds(both, change), (first, last))


def score(one: PromptScores, change: Change) -> float | None:
    """The judged score of one prompt."""
    return one.scores.get(change.name)


def _known(one: PromptScores, change: Change) -> float:
    value = score(one, change)
    assert value is not None
    return value


def _delta(pair: Both, change: Change) -> float:
    return _known(pair[1], change) - _known(pair[0], change)


def _moved(run: Run, pair: Both, change: Change) -> Moved:
    assert change.steps is not None
    one = pair[0]
    visits = {visit.step: visit for visit in run.samples}
    before, after = (
        thumbnail(visits[step], (one.prompt, one.seed), STRIP_SIDE) if step in visits else None
        for step in map(int, change.steps)
    )
    start, end = (change.value(_known(side, change)) for side in pair)
    return Moved(one.prompt, one.kind, start, end, change.value(_delta(pair, change), True), (before, after))


def _kinds(both: Sequence[Both], change: Change) -> list[Kind]:
    """In the order in which the kinds first occur; none where there is but one."""
    groups: dict[str, list[Both]] = {}
    for pair in both:
        groups.setdefault(pair[0].kind or "no kind named", []).append(pair)
    return [Kind(name, len(some), _change(some, change)) for name, some in groups.items()] if len(groups) > 1 else []


def _change(both: Sequence[Both], change: Change) -> Change:
    pairs = [(_known(before, change), _known(after, change)) for before, after in both]
    return Change.of_pairs(change.role, change.name, pairs, steps=change.steps, limits=change.limits)
