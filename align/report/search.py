"""HTML report of a search's run folder, built from the components of a training report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.data.files import write_text
from align.report.budget_curves import AXES, Row, figures
from align.report.changes import Change
from align.report.charts import short
from align.report.facts import duration, listing
from align.report.images import PAIR_SIDE, STRIP_SIDE, InlineImage, Score, playing, score_of
from align.report.page import fill
from align.report.reading import read_yaml
from align.report.search_baseline import Baseline, baseline_of, bounds
from alignflow.errors import RunFolderError

MAX_PROMPTS = 12


@dataclass(frozen=True)
class Shown:
    """One prompt: the plain sample, the best one and where it came from, the other candidates kept.

    Args:
        baseline: the sample of best-of-N; None if it was not run.
        scores: each with the one of best-of-N as text, empty if it was not run.
    """

    prompt: str
    plain: InlineImage | None
    best: InlineImage | None
    baseline: InlineImage | None
    scores: list[tuple[Score, str]]
    lineage: str
    others: list[tuple[str, InlineImage | None]]


def write_search_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the folder of a search and return its path.

    Raises:
        RunFolderError: there is no ``results.json`` in it.
    """
    results = run_dir / "results.json"
    if not results.is_file():
        raise RunFolderError(f"{run_dir} has no results.json yet")
    summary = json.loads(results.read_text(encoding="utf-8"))
    rows = summary.pop("found")
    config = run_dir / "config.yaml"
    known = [row for row in rows if row["kept"]]
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    compared, baseline = changes(summary, rows), baseline_of(summary, rows)
    page = {
        "run": summary,
        "name": summary["name"],
        "facts": facts(summary),
        "verdict": verdict(compared, baseline),
        "notes": notes(summary, rows),
        "baseline": baseline,
        "bounds": bounds,
        "changes": [(one, label(one, read_yaml(text))) for one in compared],
        "figures": figures(known, summary["method"]),
        "shown": [show(run_dir, row) for row in known[:MAX_PROMPTS]],
        "total": len(known),
        "listing": [entry for entry in listing(run_dir) if entry[0] != "report.html"],
        "config": text,
        "again": shlex.join(["alignflow", "search", "config.yaml", "--out", f"../{run_dir.resolve().name}-again"]),
    }
    path = run_dir / "report.html"
    write_text(path, fill("search.html", what="search", **page))
    return path


def changes(summary: Row, rows: Sequence[Row]) -> list[Change]:
    """Plain sample against best one, by prompt: each gold, then the reward that was optimised."""
    pairs = {
        name: [(row["gold"][name]["plain"], row["gold"][name]["best"]) for row in rows] for name in summary["gold"]
    }
    found = [_change("gold", name, both) for name, both in pairs.items()]
    return [
        one for one in [*found, _change("reward", "reward", [(row["plain"], row["reward"]) for row in rows])] if one
    ]


def _change(role: str, name: str, pairs: Sequence[tuple[float | None, float | None]]) -> Change | None:
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    return Change.of_pairs(role, name, known) if known else None


def verdict(compared: Sequence[Change], baseline: Baseline | None = None) -> tuple[str, str]:
    """Tone and sentence: by gold where there is one, else by the reward itself.

    A rise is not called good where best-of-N reaches clearly more with the same network calls.
    """
    if not compared:
        return "calm", "No prompt has a score both before and after the search."
    one = compared[0]
    ends = f"{one.value(one.before)} (plain) to {one.value(one.after)} (best)"
    gold = "Gold" if one.name == "gold" else f"Gold {one.name}"
    name = gold if one.role == "gold" else "The optimised reward"
    if one.direction == "same":
        return "calm", f"{name} did not change: {one.value(one.after)}."
    verb = {"up": "rose from", "down": "fell from"}.get(one.direction, "shows no clear change:")
    tone = {"up": "good", "down": "bad"}.get(one.direction, "calm")
    if tone == "good" and baseline is not None and baseline.main.direction == "down":
        tone = "calm"
    return tone, f"{name} {verb} {ends}."


def notes(summary: Row, rows: Sequence[Row]) -> list[str]:
    """Notes that a reader needs to trust the numbers, a sentence each."""
    told = [
        "The plain sample is generated from the prompt's first noise without a search; its cost is not in the budget."
    ]
    stays = summary.get("plain_kept")
    if stays:
        of = f"{stays:,} of {len(rows):,} prompts" if len(rows) > 1 else "this prompt"
        told.append(
            f"For {of} nothing that the search found scored higher than the plain sample, which is kept as best."
        )
    elif stays is None and any(_below(row) for row in rows):
        count = sum(map(_below, rows))
        told.append(f"For {count:,} of {len(rows):,} prompts the best sample found scores below the plain one.")
    if baseline := baseline_of(summary, rows):
        told.append(baseline.sentence)
    return told


def _below(row: Row) -> bool:
    return row["plain"] is not None and row["reward"] is not None and row["reward"] < row["plain"]


def label(one: Change, config: Row) -> str:
    """Role of a score in the search."""
    if one.role == "reward":
        return "Optimised reward"
    gold = (config.get("gold") or {}).get(one.name)
    return "Gold, the optimised reward itself" if gold and gold == config.get("reward") else "Gold, not optimised"


def headline(run_dir: Path) -> str:
    """The verdict on a search in one line."""
    summary = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    return " ".join([verdict(changes(summary, summary["found"]))[1], *notes(summary, summary["found"])[1:]])


def facts(summary: Row) -> list[tuple[str, str]]:
    """Label and value of facts that are numbers."""
    spent = summary["spent"]
    found = [("prompts", f"{summary['prompts']:,}")]
    found += [
        (f"{label} a prompt", f"{spent[name]:,.0f}")
        for name, label in AXES.items()
        if name in spent and name != "seconds"
    ]
    if spent.get("backward_calls"):
        found.append(("backward calls a prompt", f"{spent['backward_calls']:,.0f}"))
    if "seconds" in spent:
        found.append(("time a prompt", duration(spent["seconds"])))
    found.append(("overhead of the search", f"{100 * summary['overhead']:.1f} %"))
    missing = summary["missing"]
    return [*found, ("prompts without a score", str(missing))] if missing else found


def show(run_dir: Path, row: Row) -> Shown:
    """One prompt's part of the gallery."""
    folder = run_dir / "candidates" / f"{row['number']:04d}"
    other = row.get("best_of_n")
    values = {"reward": {"plain": row["plain"], "best": row["reward"], "best_of_n": other and other["reward"]}}
    values |= row["gold"]
    scores = [
        (
            score_of(name, one["plain"], one["best"]),
            score_of(name, one["plain"], one["best_of_n"]).after if other else "",
        )
        for name, one in values.items()
    ]
    others = [
        (
            f"{_said(one['reward'])}{' (worst)' if one is row['kept'][-1] else ''}",
            _image(folder / one["file"], STRIP_SIDE),
        )
        for one in row["kept"][1:]
    ]
    plain = _image(folder / row["plain_file"], PAIR_SIDE) if "plain_file" in row else None
    best = _image(folder / row["kept"][0]["file"], PAIR_SIDE)
    baseline = _image(folder / other["file"], PAIR_SIDE) if other and "file" in other else None
    return Shown(row["prompt"], plain, best, baseline, scores, ", ".join(row["lineage"]), others)


def _image(file: Path, side: int) -> InlineImage | None:
    return playing(file.with_suffix(".png"), None if file.suffix == ".png" else file, 16, side)


def _said(value: float | None) -> str:
    return "no score" if value is None else short(value)
