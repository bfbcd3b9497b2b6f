"""Runs below a folder as cards: state, verdict, scores, progress, time left, newest samples. No torch."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock as ThreadLock
from typing import Any

from align.report.facts import duration
from align.report.reading import Run, number, read_run
from align.report.search import headline
from align.report.verdict import changes, judge
from align.runs import owned
from align.runs.lock import in_use
from alignflow.text import first_line, printable

DEPTH, MOST = 5, 300
"""Folders between the given one and a run at most, and runs that are listed."""
IMAGES = 4
RECENT = 20
"""Training steps whose mean time gives the time left."""
_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "environment.json", "results.json", "samples", "candidates")
_INSIDE = {"checkpoints", "samples", "lora", "held_out", "prompts", "candidates", "export", "media", "node_modules"}
"""Folders of a run, in which no runs are looked for."""


@dataclass(frozen=True)
class Scored:
    """A score before and after, as text."""

    label: str
    before: str
    after: str
    change: str
    tone: str


@dataclass(frozen=True)
class Card:
    """Summary of one run on the page.

    Args:
        key: path below the listed folder, with slashes; ``.`` where that is the run itself.
        state: ``training``, ``finished``, ``interrupted``, or ``stopped`` where no process writes a run that has not
            said that it ended.
        done, planned: training steps, or prompts of a search; 0 where unknown.
        left: time that a run in training still needs, in words.
        images: step and row of the newest samples.
        report: whether there is a page to link to.
        problem: why the run cannot be shown.
    """

    key: str
    name: str
    kind: str = ""
    state: str = ""
    recipe: str = ""
    generator: str = ""
    tone: str = "calm"
    verdict: str = ""
    scores: tuple[Scored, ...] = ()
    done: int = 0
    planned: int = 0
    left: str = ""
    changed: float = 0.0
    images: tuple[tuple[int, int, str], ...] = ()
    report: bool = False
    problem: str = ""


class Runs:
    """The runs below a folder; a run is read again only when its files change.

    Args:
        folder: the folder, which may be a run itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._known: dict[str, tuple[tuple[Any, ...], Card]] = {}
        self._lock = ThreadLock()

    def find(self, key: str) -> Path | None:
        """The folder of a run; None if no run below the folder has this key."""
        return dict(self._found()).get(key)

    def cards(self) -> list[Card]:
        """All runs, those that changed last first."""
        with self._lock:
            found = {key: self._card(key, path) for key, path in self._found()}
            self._known = {key: self._known[key] for key in found}
        return sorted(found.values(), key=lambda card: (card.state != "training", -card.changed, card.key))

    def _found(self) -> Iterator[tuple[str, Path]]:
        """Keys and folders of the runs; links are not followed, so all of them are inside the folder."""
        count = 0
        for place, inside, files in os.walk(self.folder):
            path = Path(place)
            below = path.relative_to(self.folder)
            inside[:] = sorted(one for one in inside if not one.startswith(".") and one not in _INSIDE)
            if len(below.parts) >= DEPTH:
                inside[:] = []
            if "config.yaml" in files and {"metrics.jsonl", "summary.json", "environment.json", owned.MARK} & {*files}:
                yield below.as_posix(), path
                count += 1
            if count >= MOST:
                return

    def _card(self, key: str, path: Path) -> Card:
        busy = in_use(path)
        state = (busy, *(_stamp(path / name) for name in _FILES))
        if key not in self._known or self._known[key][0] != state:
            self._known[key] = state, card_of(key, path, busy)
        return self._known[key][1]


def card_of(key: str, path: Path, busy: bool) -> Card:
    """The card of a run; one that cannot be read has a problem, and does not hide the others.

    Args:
        busy: whether a process writes the run.
    """
    kind = str(owned.read_mark(path).get("kind") or owned.TRAINING)
    try:
        changed = max(stamp[0] for name in _FILES if (stamp := _stamp(path / name))) / 1e9
        run = read_run(path)
        state = _state(run, path, busy)
        found = _search(path, run) if kind == owned.SEARCH else _training(run, kind, state)
        return Card(key, _name(run), kind=kind, changed=changed, state=state, **found)
    except Exception as error:  # files of any kind of damage, written by any program
        return Card(key, path.name, kind=kind, problem=unreadable(error))


def unreadable(error: Exception) -> str:
    """The reason why a run cannot be shown."""
    return f"one of its files is damaged ({type(error).__name__}: {first_line(error)})"


def time_left(run: Run) -> float | None:
    """Seconds that the remaining steps take at the median pace of the newest ones; None if that is not known."""
    planned, done = number(run.section("train").get("steps")), run.steps
    times = [(row["step"], seconds) for row in run.train[-RECENT - 1 :] if (seconds := number(row.get("seconds")))]
    paces = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(times) if b[1] > a[1]]
    if planned is None or not paces:
        return None
    return max(0.0, planned - done) * statistics.median(paces)


def _training(run: Run, kind: str, state: str) -> dict[str, Any]:
    verdict = judge(run)
    left = time_left(run) if state == "training" else None
    visit = next((one for one in reversed(run.samples) if one.prompts), None)
    shown = [] if visit is None else [row for row, image in enumerate(visit.images) if image.is_file()][:IMAGES]
    return {
        "recipe": run.kind("recipe"),
        "generator": run.kind("generator"),
        "tone": verdict.tone,
        "verdict": verdict.sentence if kind == owned.TRAINING else "",
        "scores": tuple(
            Scored(
                {"gold": "gold", "reward": "trained reward"}.get(one.role, one.name),
                one.value(one.before),
                one.value(one.after),
                one.value(one.delta, signed=True),
                one.tone,
            )
            for one in changes(run)[:2]
        ),
        "done": run.steps,
        "planned": int(number(run.section("train").get("steps")) or 0),
        "left": duration(left) if left is not None else "",
        "images": tuple((visit.step, row, printable(visit.prompts[row], 300)) for row in shown) if visit else (),
        "report": kind == owned.TRAINING or (run.folder / "report.html").is_file(),
    }


def _search(path: Path, run: Run) -> dict[str, Any]:
    ended = (path / "results.json").is_file()
    count = sum(1 for one in (path / "candidates").iterdir() if not one.name.startswith("."))
    planned = number(run.section("prompts").get("limit"))
    return {
        "recipe": run.kind_of("search"),
        "generator": run.kind("generator"),
        "verdict": headline(path) if ended else "The search has not ended.",
        "done": count,
        "planned": int(planned or (count if ended else 0)),
        "report": (path / "report.html").is_file(),
    }


def _state(run: Run, path: Path, busy: bool) -> str:
    if busy:
        return "training"
    if (path / "results.json").is_file():
        return "finished"
    return run.status if run.summary else "stopped"


def _name(run: Run) -> str:
    return printable(str(run.summary.get("name") or run.config.get("name") or run.folder.name), 200)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
