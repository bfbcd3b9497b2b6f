"""Runs of a sweep, one after another: each in processes of its own, with a log; a failure does not stop the others."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.data.files import writing
from align.report import headline
from align.report.facts import duration
from align.report.search import headline as search_headline
from align.sweeps.folder import LOGS, state_of
from align.sweeps.members import Member
from alignflow.errors import AlignflowError, ConfigError
from alignflow.launch import Ended, Process, command_of, ranks, supervise

INTERRUPTED = 130
"""Exit code of a run that was asked to stop and left a checkpoint."""
TAIL = 64 * 1024
"""Bytes at the end of a log in which an error is looked for."""


@dataclass(frozen=True)
class Launcher:
    """How a run is started: in one process, in several by ``alignflow launch``, or by another launcher.

    Args:
        processes: 1 = one process, without torch.distributed.
        words: a launcher's own words, before those after ``alignflow``: ``torchrun --nproc_per_node 8 -m align``.
    """

    processes: int = 1
    words: str = ""

    def __post_init__(self) -> None:
        if self.words and self.processes > 1:
            raise ConfigError("--processes and --launcher are two ways to start a run; give one of them")

    def start(self, words: Sequence[str]) -> list[Process]:
        """The processes that run ``alignflow WORDS``."""
        if self.words:
            return [Process([*shlex.split(self.words), *words])]
        return ranks(words, self.processes) if self.processes > 1 else [Process(command_of(words))]

    def options(self) -> list[str]:
        """The options of ``alignflow sweep`` that give it."""
        several = ["--processes", str(self.processes)] if self.processes > 1 else []
        return [*several, *(["--launcher", self.words] if self.words else [])]

    def shown(self, words: Sequence[str]) -> list[str]:
        """The same as a command that a person or a script can run."""
        if self.words:
            return [*shlex.split(self.words), *words]
        launch = ["launch", "--processes", str(self.processes)] if self.processes > 1 else []
        return ["alignflow", *launch, *words]


@dataclass
class Outcome:
    """Outcome of a sweep: failed members with their reasons, and whether a signal stopped it."""

    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def run_members(folder: Path, members: Sequence[Member], launcher: Launcher, say: Callable[[str], None]) -> Outcome:
    """Run every member that is not finished, in order; an unfinished one resumes from its checkpoint.

    A signal is passed on to the run in progress, which ends with a checkpoint, and ends the sweep.
    """
    outcome = Outcome()
    for number, member in enumerate(members, 1):
        head = f"[{number}/{len(members)}] {member.name}"
        state = state_of(folder, member)
        if state.kind == "finished":
            say(f"{head}: finished before")
            continue
        log = folder / LOGS / f"{member.name}.log"
        say(f"{head}: {'resumed after ' + state.done if state.kind == 'unfinished' else 'running'}; log {log}")
        began = time.monotonic()
        ended = run_member(folder, member, launcher, log)
        took = duration(time.monotonic() - began)
        if ended.signal is not None:
            outcome.stopped = True
            break
        if ended.code == 0 and state_of(folder, member).kind == "finished":
            say(f"{head}: finished in {took}. {_told(folder / member.name, member)}".rstrip())
        else:
            outcome.failed[member.name] = reason(log, ended.code)
            say(f"{head}: failed after {took}: {outcome.failed[member.name]}")
    return outcome


def run_member(folder: Path, member: Member, launcher: Launcher, log: Path) -> Ended:
    """Run one member to its end, or from where it stopped; its output is appended to ``log``."""
    words = member.words(folder)
    if (folder / member.name).is_dir():
        words.append("--resume")
    with writing(log), log.open("ab") as output:
        output.write(f"$ {shlex.join(launcher.shown(words))}\n".encode())
        output.flush()
        try:
            return supervise(launcher.start(words), output=output)
        except OSError as error:
            output.write(f"error: cannot start {launcher.words or 'alignflow'}: {error.strerror or error}\n".encode())
            return Ended(1)


def reason(log: Path, code: int) -> str:
    """The reason why a run failed: the last error in its log, or only its exit code."""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        lines = file.read().decode("utf-8", "replace").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    own = lines[starts[-1] + 1 :] if starts else lines
    errors = [line.removeprefix("error: ") for line in own if line.startswith("error: ")]
    if code == INTERRUPTED:
        return "it was interrupted from outside the sweep; its checkpoint is kept"
    if code > 128:
        return f"ended by signal {code - 128}" + (f": {errors[-1]}" if errors else "")
    return errors[-1] if errors else f"exit code {code}"


def _told(run: Path, member: Member) -> str:
    """The verdict of a finished run in one line; empty if its report cannot be read."""
    try:
        return search_headline(run) if member.command == "search" else headline(run)
    except (AlignflowError, OSError, ValueError, KeyError):
        return ""
