"""Arms of a comparison: runs that differ only in their seed are one setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from align.comparison.entries import Entry, Key
from align.report.intervals import mean
from align.runs.identity import flatten

TONES, DASHES = ("c0", "c3", "c2", "c1", "c4"), ("", " d1", " d2")
"""Colours of the style sheet in the order of use, and the dashes that tell apart arms of one colour."""
OWN = ("name", "out", "seed")
"""Settings in which the runs of one arm may differ."""


@dataclass(frozen=True)
class Arm:
    """One setting: the run, or the runs of several seeds, with its name and colour on the page.

    Args:
        entries: at least one.
        left_out: runs of the same setting that are not finished, where another one is.
    """

    label: str
    tone: str
    entries: list[Entry]
    left_out: list[Entry] = field(default_factory=list)

    @property
    def first(self) -> Entry:
        return self.entries[0]

    @property
    def seeds(self) -> list[int | None]:
        return [one.seed for one in self.entries]

    def known(self, name: str) -> dict[Key, float]:
        """A score by prompt, the mean over the seeds, of the prompts that have it with every seed.

        Where every run was evaluated with its own noise, the runs have no prompt and noise in common; then the prompts
        of all of them.
        """
        columns = [one.known(name) for one in self.entries]
        if all(_own_noise(one) for one in self.entries):
            return {key: value for one in columns for key, value in one.items()}
        return {key: mean([one[key] for one in columns]) for key in columns[0] if all(key in one for one in columns)}

    def settings(self) -> dict[str, Any]:
        """Settings by dotted key, with all its seeds."""
        return {**settings_of(self.first), "seed": ", ".join(map(str, self.seeds))}


def settings_of(entry: Entry) -> dict[str, Any]:
    """Settings of a run by dotted key, without its name and folder."""
    return {key: value for key, value in flatten(entry.config).items() if key not in OWN[:2]}


def arms_of(entries: Sequence[Entry], each: bool = False) -> list[Arm]:
    """Runs grouped over seeds, in the order of their first; every run by itself where one arm would be left.

    Args:
        each: do not group.
    """
    groups: list[list[Entry]] = []
    for one in entries:
        home = next((group for group in groups if _joins(one, group)), None)
        if home is None:
            groups.append([one])
        else:
            home.append(one)
    if each or len(groups) < 2:
        groups = [[one] for one in entries]
    labels = _distinct([_label(group) for group in groups], groups)
    return [_arm(group, labels[place], place) for place, group in enumerate(groups)]


def _joins(one: Entry, group: Sequence[Entry]) -> bool:
    """Whether a run differs from those of a group only in its seed; unknown without a config.

    The seed of the evaluation is the same in all of them, or that of each run.
    """
    own = all(_own_noise(other) for other in (one, *group))
    same = one.kind == group[0].kind and _but_seed(one, own) == _but_seed(group[0], own)
    return bool(one.config) and same and one.seed not in [other.seed for other in group]


def _own_noise(one: Entry) -> bool:
    """Whether the seed of the evaluation is that of the run, as ``benchmarks.learning`` has it."""
    return one.kind == "training run" and one.seed is not None and one.section("evaluate").get("seed") == one.seed


def _but_seed(one: Entry, own: bool) -> str:
    left_out = ("seed", "evaluate.seed") if own else ("seed",)
    kept = {key: value for key, value in settings_of(one).items() if key not in left_out}
    return json.dumps(kept, sort_keys=True, default=str)


def _arm(group: list[Entry], label: str, place: int) -> Arm:
    done = [one for one in group if one.status == "finished" and one.after] or group[:]
    tone = TONES[place % len(TONES)] + DASHES[place // len(TONES) % len(DASHES)]
    return Arm(label, tone, done, [one for one in group if one not in done])


def _label(group: Sequence[Entry]) -> str:
    """The sweep's name of the setting, the run's name, or the common part of the names of the runs."""
    if len(group) == 1:
        return group[0].name
    if group[0].shared:
        return group[0].shared
    letters = zip(*(one.name for one in group), strict=False)
    start = "".join(some[0] for some in takewhile(lambda some: len(set(some)) == 1, letters)).rstrip("-_. ")
    return start.removesuffix("seed").rstrip("-_. ") or group[0].name


def _distinct(labels: Sequence[str], groups: Sequence[Sequence[Entry]]) -> list[str]:
    return [
        label if labels.count(label) == 1 else f"{label} ({group[0].name})"
        for label, group in zip(labels, groups, strict=True)
    ]
