"""A comparison as data, as a page and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.comparison import tables
from align.comparison.arms import Arm, arms_of
from align.comparison.entries import Entry, Notes, entries_of
from align.comparison.figures import sections
from align.comparison.gallery import gallery
from align.comparison.matching import difference, shared_scores
from align.comparison.notes import notes_of, verdict
from align.data.files import without_nan, write_text, writing
from align.report.changes import Change
from align.report.page import fill
from alignflow.errors import RunFolderError

MADE = "Made by alignflow"
"""Words that every page of this project has."""
MOST_TILES = 8


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Args:
        folders: as they were given.
        arms: the settings; runs that differ in their seed alone are one.
        scores: held-out scores that can be compared, the judging one first.
        notes: title and text of what limits the comparison.
    """

    folders: Sequence[Path]
    entries: list[Entry]
    arms: list[Arm]
    scores: list[tables.Score]
    notes: Notes

    @property
    def judged(self) -> str | None:
        """The score that the comparison judges by."""
        return self.scores[0].name if self.scores else None

    def verdict(self) -> tuple[str, str, str]:
        """Tone, sentence and detail."""
        return verdict(self.arms, self.judged)

    def lines(self) -> list[tuple[list[str], list[list[str]]]]:
        """Head and rows of the tables for a terminal."""
        return tables.lines(self.arms, self.scores[:1])

    def numbers(self) -> dict[str, Any]:
        """Everything in numbers, for scripts."""
        found = [_numbers(one) for one in self.scores]
        arms = [
            {
                "label": arm.label,
                "runs": [str(one.folder) for one in arm.entries],
                "costs": [one.costs for one in arm.entries],
            }
            for arm in self.arms
        ]
        told: dict[str, Any] = without_nan(
            {"settings": arms, "scores": found, "notes": [f"{title}: {text}" for title, text in self.notes]}
        )
        return told


def compare(folders: Sequence[Path], each: bool = False) -> Comparison:
    """Read and compare the runs in ``folders``: training runs, searches, benchmarks and sweeps.

    Args:
        each: compare every run by itself; without it, runs that differ in their seed alone are one setting.

    Raises:
        RunFolderError: a folder is not a run, there are fewer than two runs, or nothing in them can be compared.
    """
    entries, notes = entries_of(folders)
    arms = arms_of(entries, each)
    names = shared_scores(arms)
    if not names:
        _check_curves(arms)
    scores = [tables.score(arms, name) for name in names]
    return Comparison(folders, entries, arms, scores, [*notes, *notes_of(arms, entries)])


def _check_curves(arms: Sequence[Arm]) -> None:
    """Without a shared score, two settings must at least have trained on the same reward, generator and prompts."""
    keys = [_trained_on(arm) for arm in arms if arm.first.run and arm.first.run.train]
    if len({*keys}) < len(keys):
        return
    pairs = [(a, b) for place, a in enumerate(arms) for b in arms[place + 1 :]]
    reasons = [reason for a, b in pairs for reason in _reasons(a, b)]
    told = "\n  ".join(list(dict.fromkeys(reasons))[:8])
    raise RunFolderError(f"nothing in these runs can be compared:\n  {told}")


def _trained_on(arm: Arm) -> str:
    sections = ("reward", "generator", "prompts")
    return str([arm.first.config.get(name) for name in sections])


def _reasons(a: Arm, b: Arm) -> list[str]:
    names = list(dict.fromkeys([*a.first.names(), *b.first.names()])) or ["reward"]
    found = [difference(a, b, name) for name in names]
    return [one for one in found if isinstance(one, str)]


def write_page(found: Comparison, path: Path) -> Path:
    """Write the page of a comparison and return its path.

    Raises:
        RunFolderError: a file that is not a page of alignflow has this name.
    """
    path = path / "compare.html" if path.is_dir() else path
    if path.exists() and MADE not in path.read_text(encoding="utf-8", errors="replace"):
        raise RunFolderError(f"{path} exists and is not a page of alignflow; give --out another name")
    text = render(found)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def render(found: Comparison) -> str:
    """The page as text."""
    names = [one.name for one in found.scores]
    settings, more = tables.settings(found.arms)
    pairs = sum(len(one.differences) for one in found.scores)
    name = " and ".join(arm.label for arm in found.arms) if len(found.arms) < 4 else f"{len(found.arms)} settings"
    page: dict[str, Any] = {
        "name": name,
        "arms": found.arms,
        "runs": len(found.entries),
        "verdict": found.verdict(),
        "notes": found.notes,
        "tiles": found.scores[0].results if found.scores and len(found.arms) <= MOST_TILES else [],
        "scores": found.scores,
        "pairs": pairs,
        "interval": tables.interval,
        "gallery": gallery(found.arms, found.judged),
        "sections": sections(found.arms, names),
        "settings": settings,
        "more_settings": more,
        "machines": tables.machines(found.arms),
        "costs": tables.costs(found.arms),
        "again": shlex.join(["alignflow", "compare", *map(str, found.folders)]),
    }
    return fill("compare.html", what="comparison", **page)


def _numbers(one: tables.Score) -> dict[str, Any]:
    results = [{"setting": row.arm.label, **_change(row.change), "after": row.value} for row in one.results]
    differences = [
        {
            "first": row.first.label,
            "second": row.second.label,
            "paired_by": row.pairing,
            "over_prompts": _change(row.prompts),
            "over_seeds": _change(row.seeds) if row.seeds else None,
        }
        for row in one.differences
    ]
    return {"name": one.name, "results": results, "differences": differences}


def _change(change: Change | None) -> dict[str, Any]:
    if change is None:
        return {}
    interval = list(change.interval) if change.interval else None
    return {
        "before": change.before,
        "after": change.after,
        "delta": change.delta,
        "interval": interval,
        "pairs": change.pairs,
    }
