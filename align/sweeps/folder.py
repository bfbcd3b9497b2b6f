"""Folder of a sweep: ``sweep.json`` with its members, a run folder for each, their logs, the comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.files import write_json, writing
from align.report.reading import read_run
from align.runs import owned
from align.runs.identity import MEMORY_ALONE, changes, under
from align.sweeps.members import Member
from alignflow.errors import RunFolderError
from alignflow.words import count, listing

PLAN, LOGS, PAGE = "sweep.json", "logs", "compare.html"
FREE = (*MEMORY_ALONE, "generator.device", "train.threads", "checkpoint.keep")
"""Settings that another start of a sweep may change: they leave its results alone."""


@dataclass(frozen=True)
class State:
    """How far a member is: ``new``, ``unfinished`` or ``finished``; ``done`` says it in words."""

    kind: str
    done: str = ""


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / PLAN).is_file()


def read_plan(folder: Path) -> list[Member]:
    """The members that ``sweep.json`` of a folder lists.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        raise RunFolderError(f"{folder} is not a sweep: it has no {PLAN}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["members"]
        return [Member(**{**row, "files": tuple(row["files"]), "overrides": tuple(row["overrides"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"{path} is damaged ({type(error).__name__}); start another sweep with --out") from None


def check_folder(folder: Path, members: Sequence[Member], resume: bool) -> list[str]:
    """Names of the members that the folder does not list yet.

    Raises:
        RunFolderError: it is in the way, or it holds a sweep and ``resume`` was not given, or one of other members or
            settings.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return [member.name for member in members]
    if not folder.is_dir():
        raise RunFolderError(f"{folder} exists and is not a folder; choose another name with --out")
    if not is_sweep(folder):
        raise RunFolderError(f"{folder} exists and is not a sweep; choose another folder with --out")
    if not resume:
        raise RunFolderError(f"the sweep {folder} exists; add --resume to continue it, or choose another with --out")
    known, now = {member.name: member for member in read_plan(folder)}, {member.name: member for member in members}
    if gone := [name for name in known if name not in now]:
        raise RunFolderError(
            f"{folder} holds {count(len(gone), 'run')} that this sweep does not have: {listing(gone)}; repeat the "
            "words it was started with (further values may be added), or start another sweep with --out"
        )
    lines = [line for name in known for line in _different(known[name], now[name])]
    if lines:
        raise RunFolderError(
            f"{folder} was made with other settings, so it cannot be continued:\n  " + "\n  ".join(lines[:12])
            + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
            + "\n  use the old settings, or start another sweep with --out"
        )  # fmt: skip
    return [name for name in now if name not in known]


def _different(then: Member, now: Member) -> list[str]:
    if then.command != now.command:
        return [f"{now.name}: alignflow {then.command} then, alignflow {now.command} now"]
    changed = changes(then.settings, json.loads(json.dumps(now.settings)))
    return [f"{now.name}: {key}: {a!r} then, {b!r} now" for key, (a, b) in changed.items() if not under(key, FREE)]


def write_plan(folder: Path, members: Sequence[Member]) -> None:
    """Make the folder and list the members in it."""
    with writing(folder):
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
    if not owned.read_mark(folder):
        owned.mark(folder, owned.SWEEP)
    write_json(folder / PLAN, {"format": 1, "members": [_row(member) for member in members]})


def _row(member: Member) -> dict[str, Any]:
    return {
        "name": member.name,
        "files": list(member.files),
        "overrides": list(member.overrides),
        "varied": dict(member.varied),
        "command": member.command,
        "settings": dict(member.settings),
    }


def state_of(folder: Path, member: Member) -> State:
    """How far a member of the sweep in ``folder`` is, by the files of its run."""
    run = folder / member.name
    if not (run / "config.yaml").is_file():
        return State("new")
    if member.command == "search":
        results = _object(run / "results.json")
        made = len(list(run.glob("candidates/*/found.json")))
        finished = results.get("status") == "finished"
        return State("finished" if finished else "unfinished", count(made, "prompt"))
    found = read_run(run)
    planned = member.settings.get("train.steps")
    done = f"{found.steps} of {planned} steps" if planned else count(found.steps, "step")
    return State("finished" if found.status == "finished" else "unfinished", done)


def _object(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
