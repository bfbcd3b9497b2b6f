"""Compared folders, all read into one form: training runs, searches and benchmarks, and the runs of a sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from align.report.changes import PARTS, score_name
from align.report.facts import costs
from align.report.intervals import mean, standard_error
from align.report.reading import Run, Samples, number, read_run, read_yaml
from align.runs import owned
from align.sweeps.folder import is_sweep, read_plan, state_of
from alignflow.errors import RunFolderError
from alignflow.words import listing

Key = tuple[str, str]
"""A prompt, and what its noise comes from."""
Values = dict[Key, dict[str, float | None]]
Kind = Literal["training run", "search", "benchmark"]
Notes = list[tuple[str, str]]


@dataclass(frozen=True)
class Shot:
    """A sample on disk: its image (of a video the middle frame), its video, its scores."""

    image: Path
    video: Path | None = None
    fps: float = 16
    scores: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Mean:
    """Mean of a score over prompts, with its standard error and the number of prompts where they are known."""

    value: float
    error: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Entry:
    """One compared folder.

    Args:
        before: scores of the start: of the base model, or of the plain samples; empty if none were kept.
        after: scores of the result: of the last evaluation, or of the best samples.
        judged: the score that judges the run: gold, or the first there is.
        shared: what it has in common with the runs of other seeds, as a sweep calls it; empty if no sweep says so.
        run: the training run; None for others.
        rows: results of a search by prompt; empty for others.
    """

    folder: Path
    kind: Kind
    name: str
    status: str
    config: dict[str, Any]
    environment: dict[str, Any]
    before: Values
    after: Values
    judged: str | None
    costs: dict[str, float]
    shots: tuple[dict[Key, Shot], dict[Key, Shot]] = field(default_factory=lambda: ({}, {}))
    shared: str = ""
    run: Run | None = None
    rows: Sequence[dict[str, Any]] = ()

    @property
    def seed(self) -> int | None:
        """The random seed of the run."""
        return self.config.get("seed")

    def section(self, name: str) -> dict[str, Any]:
        """A part of the config; empty if there is none."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    def reward_of(self, name: str) -> dict[str, Any] | None:
        """Settings of the reward behind a score; None if the config does not say."""
        if name == "reward" or name.startswith(PARTS):
            found = self.config.get("reward")
        elif self.kind == "search":
            found = self.section("gold").get(name)
        else:
            found = (self.section("evaluate").get("rewards") or {}).get(name)
        return found if isinstance(found, dict) else None

    def names(self) -> list[str]:
        """Scores of the result, in the order in which they were written."""
        kept = dict.fromkeys(name for scores in self.after.values() for name in scores)
        return list(kept or dict.fromkeys(self.run.score_names() if self.run else ()))

    def known(self, name: str, end: Literal["before", "after"] = "after") -> dict[Key, float]:
        """One score by prompt, where it is not missing."""
        found = ((key, scores.get(name)) for key, scores in getattr(self, end).items())
        return {key: value for key, value in found if value is not None}

    def mean(self, name: str, end: Literal["before", "after"] = "after") -> Mean | None:
        """A score over the prompts; of an older training run, which kept no scores by prompt, as it wrote the mean."""
        values = list(self.known(name, end).values())
        if values:
            return Mean(mean(values), standard_error(values), len(values))
        rows = self.run.evals if self.run else []
        if end == "before":
            rows = [row for row in rows if row["step"] == 0]
        row = rows[-1] if rows else {}
        value = number((row.get("scores") or {}).get(name))
        if value is None:
            return None
        return Mean(value, number((row.get("stderr") or {}).get(name)), int(number(row.get("prompts")) or 0) or None)


def entries_of(folders: Sequence[Path]) -> tuple[list[Entry], Notes]:
    """The runs in some folders, those of sweeps included, with names that differ; and notes on what is missing.

    Raises:
        RunFolderError: a folder is not a run, is named twice, or there are fewer than two runs.
    """
    found, notes, seen = list[Entry](), Notes(), dict[Path, Path]()
    for folder in folders:
        if (there := seen.setdefault(folder.resolve(), folder)) is not folder:
            raise RunFolderError(f"{folder} is named twice (also as {there}): give every run once")
        if folder.is_dir() and is_sweep(folder):
            members, missing = _members(folder)
            found, notes = [*found, *members], [*notes, *missing]
        else:
            found.append(_read(folder))
    if len(found) < 2:
        alone = f"{found[0].folder} is the only run" if found else "no run of it has started"
        raise RunFolderError(f"a comparison needs two runs, and {alone}; alignflow report shows a single run")
    return _named(found), [*notes, *_copies(found)]


def _members(folder: Path) -> tuple[list[Entry], Notes]:
    found, notes, new = list[Entry](), Notes(), list[str]()
    for member in read_plan(folder):
        if state_of(folder, member).kind == "new":
            new.append(member.name)
            continue
        try:
            found.append(replace(_read(folder / member.name), name=member.name, shared=member.label))
        except RunFolderError as error:
            notes.append(("Left out", f"{error}."))
    if new:
        notes.append(("Not started", f"Left out of the sweep {folder.name}, without results yet: {listing(new)}."))
    return found, notes


def _read(folder: Path) -> Entry:
    if not folder.exists():
        raise RunFolderError(f"no run folder {folder} (looked in {Path.cwd()})")
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; compare reads run folders")
    if (folder / "benchmark.json").is_file():
        return _benchmark(folder)
    if (folder / "candidates").is_dir():
        return _search(folder)
    kind = owned.read_mark(folder).get("kind", owned.TRAINING)
    if kind != owned.TRAINING:
        raise RunFolderError(f"{folder} is a {kind}; compare reads training runs, searches, benchmarks and sweeps")
    return _training(read_run(folder))


def _training(run: Run) -> Entry:
    steps = [int(row["step"]) for row in run.evals]
    first = run.by_prompt(0) if steps[:1] == [0] else []
    last = run.by_prompt(steps[-1]) if steps and steps[-1] > 0 else []
    gold = score_name(run, "gold") or score_name(run, "reward")
    visits = [visit for visit in run.samples if visit.prompts]
    ends = [visit for visit in visits if visit.step == 0], [visit for visit in visits[-1:] if visit.step > 0]
    return Entry(
        run.folder, "training run", str(run.summary.get("name") or run.config.get("name") or run.folder.resolve().name),
        run.status, run.config, run.environment,
        {(one.prompt, f"evaluate {one.seed}"): one.scores for one in first},
        {(one.prompt, f"evaluate {one.seed}"): one.scores for one in last},
        gold or next(iter(run.score_names()), None), costs(run),
        (_shots(ends[0]), _shots(ends[1])), run=run,
    )  # fmt: skip


def _shots(visits: Sequence[Samples]) -> dict[Key, Shot]:
    found = {}
    for visit in visits:
        for row, (prompt, seed) in enumerate(zip(visit.prompts, visit.seeds, strict=False)):
            scores = {name: column[row] for name, column in visit.scores.items() if row < len(column)}
            found[prompt, f"evaluate {seed}"] = Shot(visit.images[row], visit.video_file(row), visit.fps, scores)
    return found


def _search(folder: Path) -> Entry:
    results = _object(folder / "results.json")
    if "found" not in results:
        raise RunFolderError(
            f"the search {folder} has no results.json yet: let it finish, or continue it with alignflow search --resume"
        )
    text = (folder / "config.yaml").read_text(encoding="utf-8") if (folder / "config.yaml").is_file() else ""
    config, rows = read_yaml(text), results["found"]
    keys = [(row["prompt"], f"search {config.get('seed', 0)} {row['number']}") for row in rows]
    values: list[Values] = []
    for end, own in (("plain", "plain"), ("best", "reward")):
        golds = [{name: both[end] for name, both in row["gold"].items()} for row in rows]
        values.append({key: {**gold, "reward": row[own]} for key, gold, row in zip(keys, golds, rows, strict=True)})
    shots: tuple[dict[Key, Shot], dict[Key, Shot]] = ({}, {})
    for key, row in zip(keys, rows, strict=True):
        files = row.get("plain_file"), row["kept"][0]["file"] if row["kept"] else None
        for side, file in enumerate(files):
            if file is not None:
                path = folder / "candidates" / f"{row['number']:04d}" / file
                video = None if path.suffix == ".png" else path
                shots[side][key] = Shot(path.with_suffix(".png"), video, 16, values[side][key])
    judged = next(iter(results["gold"]), "reward")
    spent = {f"{name} a prompt": value for name, value in results["spent"].items()}
    return Entry(
        folder, "search", results["name"], results["status"], config, _object(folder / "environment.json"),
        values[0], values[1], judged, spent, shots, rows=rows,
    )  # fmt: skip


def _benchmark(folder: Path) -> Entry:
    """Entry of a benchmark; with several samples of a prompt, the mean counts and the first is shown."""
    config = _object(folder / "benchmark.json")
    by_key: dict[Key, list[dict[str, Any]]] = {}
    seed = (config.get("evaluate") or {}).get("seed", 0)
    for row in _rows(folder / "samples.jsonl"):
        by_key.setdefault((row["prompt"], f"benchmark {seed} {row['number']}"), []).append(row)
    after: Values = {}
    for key, rows in by_key.items():
        columns = {name: [row["scores"][name] for row in rows] for name in rows[0]["scores"]}
        known = {name: [value for value in column if value is not None] for name, column in columns.items()}
        after[key] = {name: mean(column) if column else None for name, column in known.items()}
    if not after:
        raise RunFolderError(f"the benchmark {folder} has no samples yet")
    shots = {key: _benchmark_shot(folder, rows[0], after[key]) for key, rows in by_key.items()}
    status = "finished" if (folder / "results.json").is_file() else "running"
    judged = next(iter(next(iter(after.values()))), None)
    return Entry(
        folder, "benchmark", folder.resolve().name, status, config, {}, {}, after, judged,
        {"held-out samples": sum(map(len, by_key.values()))}, ({}, shots),
    )  # fmt: skip


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a table of samples; a line that an interrupt cut short is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _benchmark_shot(folder: Path, row: dict[str, Any], scores: dict[str, float | None]) -> Shot:
    file = folder / row["file"]
    return Shot(file, None if file.suffix == ".png" else file, 16, scores)


def _object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if it is not there or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(entries: list[Entry]) -> list[Entry]:
    """Names of their own: equal ones become the folders' names, or the whole paths."""
    found = entries
    for name_of in (lambda one: one.folder.resolve().name, lambda one: str(one.folder)):
        names = [one.name for one in found]
        found = [replace(one, name=name_of(one)) if names.count(one.name) > 1 else one for one in found]
    return found


def _copies(entries: Sequence[Entry]) -> Notes:
    notes, seen = Notes(), dict[str, Entry]()
    for one in entries:
        mark = owned.read_mark(one.folder).get("id")
        if mark and (first := seen.setdefault(mark, one)) is not one:
            notes.append(("Copies of one run", f"{first.folder} and {one.folder} are copies of the same run."))
    return notes
