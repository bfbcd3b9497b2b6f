"""``alignflow sweep``: check all runs, then list them, write them as a Slurm array, or run and compare them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from align.config.load import default_name
from align.runs.lock import locked
from align.sweeps import slurm
from align.sweeps.folder import PAGE, check_folder, state_of, write_plan
from align.sweeps.members import Member, checked, members_of
from align.sweeps.running import Launcher, Outcome, run_members
from align.sweeps.words import CONFIG, axes_of
from alignflow.errors import AlignflowError, ConfigError
from alignflow.terminal import echo, table
from alignflow.words import count

Compare = Callable[[Path, Path], None]
"""(folder of the sweep, page to write): compares the runs and prints the table."""


def sweep(
    words: Sequence[str],
    out: Path | None,
    launcher: Launcher,
    compare: Compare,
    *,
    script: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> int:
    """Run, list or write out a sweep; returns the exit code.

    Args:
        words: the configs and overrides of the command line.
        out: folder of the sweep; None = ``runs/<name>-sweep``.
        script: a Slurm script to write instead of running.
        dry_run: only check and list.

    Raises:
        AlignflowError: the words, a member or the folder is wrong; nothing was started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a sweep starts the processes of its runs: alignflow sweep --processes N, without launch")
    planned = members_of(axes_of(words[0], words[1:]))
    folder = out or Path("runs") / f"{_name(planned)}-sweep"
    members, notes = checked(planned, folder)
    new = check_folder(folder, members, resume or dry_run)
    if launcher.processes > 1 and any(member.command == "search" for member in members):
        raise ConfigError("--processes is for training; a search runs in one process")
    for note in notes:
        echo(note)
    if any("replaces" in note for note in notes):
        echo("note       configs side by side are merged; commas make them alternatives: a.yaml,b.yaml")
    if dry_run:
        _list(folder, members)
        return 0
    with locked(folder):
        if new:
            write_plan(folder, members)
        if script is not None:
            slurm.write_script(script, slurm.script(folder, members, launcher, script))
            echo(f"{script}: an array of {count(len(members), 'run')} into {folder}; submit it with sbatch {script}")
            return 0
        outcome = run_members(folder, members, launcher, echo)
        return _close(folder, members, outcome, compare, [*words, "--out", str(folder), *launcher.options()])


def _name(members: Sequence[Member]) -> str:
    """A sweep's name: that of its first config, with those of the alternatives."""
    first = default_name([Path(file) for file in members[0].files])
    others = dict.fromkeys(member.varied[CONFIG] for member in members if CONFIG in member.varied)
    return "-".join([first, *list(others)[1:]])[:100]


def _list(folder: Path, members: Sequence[Member]) -> None:
    keys = list(dict.fromkeys(key for member in members for key in member.varied))
    states = [state_of(folder, member) for member in members]
    told = [f"{state.kind} ({state.done})" if state.done else state.kind for state in states]
    rows = [
        [member.name, *(member.varied.get(key, "") for key in keys), state]
        for member, state in zip(members, told, strict=True)
    ]
    echo(table(["run", *keys, "state"], rows))
    left = sum(state.kind != "finished" for state in states)
    echo(f"{count(len(members), 'run')} into {folder}, {left} to be run; nothing was written")


def _close(folder: Path, members: Sequence[Member], outcome: Outcome, compare: Compare, again: Sequence[str]) -> int:
    """The comparison of what is there, what failed, and how to continue."""
    words = shlex.join(["alignflow", "sweep", *again, "--resume"])
    if outcome.stopped:
        echo(f"stopped; continue the sweep with\n  {words}", err=True)
        return 130
    try:
        compare(folder, folder / PAGE)
    except AlignflowError as error:
        echo(f"no comparison: {error}", err=True)
    for name, why in outcome.failed.items():
        echo(f"error: {name} failed: {why}", err=True)
    if outcome.failed:
        echo(f"{len(outcome.failed)} of {count(len(members), 'run')} failed; run them again with\n  {words}", err=True)
    return 1 if outcome.failed else 0
