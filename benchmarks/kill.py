"""Kills of a command: SIGKILL before every file operation, and at random moments.

    python -m benchmarks.kill --jobs train search reward export --random 100 --processes 1 2

A command is run once undisturbed. Then it is killed before its first file operation and run again as its user would
(``--resume``), killed before its second and run again, and so on. It passes where the second run ends by itself and
leaves the same folder: the same names, weights, images and rows, no litter. Every run is forked from a process that
has imported everything, so that a point costs about what the command itself costs. Ends with 1 if any point failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.helpers.kill_jobs import JOBS

os.environ.setdefault("OMP_NUM_THREADS", "1")

TIMING = ("seconds", "time", "busy", "images_per_second", "overhead", "created", "folder", "from")
UNTOLD = ("environment.json", "report.html", "manifest.json", "optimizer.pt", ".alignflow.json", "README.md")
"""Files that hold times, versions or an id: their presence counts, their content does not."""

AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate", "os.utime")
# -- killing ----------------------------------------------------------------------------------------------------------


def _count_operations(root: Path, fatal: int | None, tally: Path, copies: Path | None) -> None:
    """Count, from here on, this process's file operations below ``root``.

    Args:
        fatal: number of the operation (from 1) before which the process dies.
        copies: where the folder is copied before every operation, unless it is as it was before an earlier one.
    """
    import safetensors.torch
    import torch

    done, inside, busy = 0, str(root.resolve()), False
    known: set[str] = set()

    def operation(what: str) -> None:
        nonlocal done, busy
        if busy:
            return
        done += 1
        if done == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(log, f"{done} {what}\n".encode())
        if copies is not None:
            busy = True
            if (state := _state(root)) not in known:
                known.add(state)
                shutil.copytree(root, copies / f"{done:05d}", symlinks=True)
            busy = False

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event not in AUDITED or not args:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        relative = len(args) > 1 and isinstance(args[-1], int) and args[-1] > 2 and event in ("os.remove", "os.rmdir")
        if relative or any(isinstance(arg, str | os.PathLike) and str(arg).startswith(inside) for arg in args):
            operation(f"{event} {args[0]}")

    log = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    _before(os, "fsync", operation)
    _before(torch, "save", operation)
    _before(safetensors.torch, "serialize_file", operation)
    sys.addaudithook(audit)


def _before(module: Any, name: str, operation: Callable[[str], None]) -> None:
    """Call ``operation`` before every call of a module's function."""
    function = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        operation(name)
        return function(*args, **kwargs)

    setattr(module, name, counted)


def _state(folder: Path) -> str:
    """Digest of all names and bytes below a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        found.update(f"{file.relative_to(folder)}\0".encode())
        if file.is_file():
            found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def forked(work: Callable[[], object], world: int = 1, delay: float | None = None, limit: float = 120.0) -> list[int]:
    """Run ``work`` in ``world`` processes of one training run; their exit codes, -9 for a killed one.

    Once one of them died the others are killed, as a launcher does. ``delay`` kills all after so many seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = {_fork(work, rank, world, port): rank for rank in range(world)}
    codes: dict[int, int] = {}
    deadline = time.monotonic() + (limit if delay is None else delay)
    while len(codes) < world:
        for pid, rank in pids.items():
            if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
        if any(codes.values()) or time.monotonic() > deadline:
            for pid, rank in pids.items():
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[rank] for rank in range(world)]


def _fork(work: Callable[[], object], rank: int, world: int, port: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        if world > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ |= {name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if "KILL_VERBOSE" not in os.environ:
            os.dup2(null, 2)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


# -- comparing --------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, str]:
    """Name of every file below a folder -> digest of what of it must be equal; litter is there by its name."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir():
            found[f"{name}/"] = ""
        elif file.name in UNTOLD:
            found[name] = "there"
        elif file.suffix in (".json", ".jsonl"):
            rows = (
                [_timeless(json.loads(line)) for line in file.read_text().splitlines()]
                if file.suffix == ".jsonl"
                else []
            )
            found[name] = json.dumps(rows or _timeless(json.loads(file.read_text())), sort_keys=True)
        else:
            text = file.read_bytes().replace(str(folder.parent).encode(), b"")
            found[name] = hashlib.sha256(text).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in TIMING}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


@dataclass
class Result:
    """Outcome of a job's kills."""

    job: str
    world: int
    points: int = 0
    states: int = 0
    kills: int = 0
    failed: list[str] = field(default_factory=list)


class Trial:
    """A job, what it needs, and what it leaves when nothing disturbs it."""

    def __init__(self, name: str, folder: Path, world: int = 1) -> None:
        self.job, self.world, self.base = JOBS[name], world, folder
        self.result = Result(name, world)
        self.tally = folder / "tally"
        template = folder / "template"
        template.mkdir(parents=True)
        self._must(forked(lambda: self.job.prepare(template)), "preparing")
        began = time.monotonic()
        self.folder = self._fresh()
        self._must(self._run(again=False), "the undisturbed run")
        self.seconds = time.monotonic() - began
        self.expected = content(self.folder / self.job.out)
        self._fresh()
        self.copies = folder / "copies"
        self._must(self._run(again=False, copies=self.copies), "the copied run")
        self.operations = self.tally.read_text().splitlines()
        self.result.points = len(self.operations)
        self.result.states = len(list(self.copies.iterdir()))

    def _must(self, codes: list[int], what: str) -> None:
        if any(codes):
            raise SystemExit(f"{self.result.job}: {what} failed with {codes}")

    def _fresh(self, source: Path | None = None) -> Path:
        folder = self.base / "work"  # one place for all runs, since files may hold its path
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source or self.base / "template", folder, symlinks=True)
        return folder

    def _run(
        self, *, again: bool, fatal: int | None = None, delay: float | None = None, copies: Path | None = None
    ) -> list[int]:
        def work() -> None:
            os.chdir(self.folder)
            if not again and os.environ.get("RANK", "0") == "0":
                _count_operations(self.folder, fatal, self.tally, copies)
            self.job.run(self.folder, again)

        return forked(work, self.world, delay)

    def copied(self) -> None:
        """Run again from every copy, compare."""
        for copy in sorted(self.copies.iterdir()):
            self._fresh(copy)
            self._judge(f"before operation {self.operations[int(copy.name) - 1]}")

    def at(self, point: int) -> None:
        """Kill before operation ``point`` (from 1), run again, compare."""
        self._fresh()
        codes = self._run(again=False, fatal=point)
        self.result.kills += -signal.SIGKILL in codes
        said = self.operations[point - 1] if point <= len(self.operations) else "?"
        self._judge(f"killed at operation {said}")

    def after(self, delay: float) -> None:
        """Kill after so many seconds, run again, compare."""
        self._fresh()
        self.result.kills += -signal.SIGKILL in self._run(again=False, delay=delay)
        self._judge(f"killed after {delay:.2f} s")

    def _judge(self, where: str) -> None:
        codes = self._run(again=True)
        if any(codes):
            self.result.failed.append(f"{where}: run again it ended with {codes}")
            return
        found = content(self.folder / self.job.out)
        different = sorted(
            name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)
        )
        beside = sorted(entry.name for entry in self.folder.iterdir() if ".alignflow-" in entry.name)
        if different or beside:
            self.result.failed.append(f"{where}: {', '.join((different + beside)[:4])} differ")


def main() -> None:
    """Print a line per job, and every failure; leave with 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--real", type=int, default=3, help="kills before an operation, of each job")
    parser.add_argument("--random", type=int, default=100, help="kills at random moments, over all jobs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import align.export
    import align.preference.train
    import align.report
    import align.runs.trained
    import align.search.run
    import align.training.trainer  # noqa: F401  # so that the forked processes have it

    rng = random.Random(options.seed)
    pairs = [
        (name, world) for name in options.jobs for world in options.processes if world == 1 or JOBS[name].processes
    ]
    failed = 0
    print(f"{'job':10} processes operations states kills failed seconds", flush=True)
    for name, world in pairs:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            trial = Trial(name, Path(folder).resolve() / "trial", world)
            trial.copied()
            for point in rng.sample(range(1, trial.result.points + 1), min(options.real, trial.result.points)):
                trial.at(point)
            for _ in range(-(-options.random // len(pairs))):
                trial.after(rng.uniform(0.0, trial.seconds))
            found = trial.result
            cost = time.monotonic() - began
            print(
                f"{name:10} {world:9} {found.points:10} {found.states:6} {found.kills:5} {len(found.failed):6} "
                f"{cost:7.0f}",
                flush=True,
            )
            for line in found.failed:
                print(f"  {line}")
            failed += len(found.failed)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
