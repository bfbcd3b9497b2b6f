"""What a kill leaves behind: SIGKILL before every file operation of a command, and at random moments.

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

os.environ.setdefault("OMP_NUM_THREADS", "1")

TIMING = ("seconds", "time", "busy", "images_per_second", "overhead", "created", "folder", "from")
UNTOLD = ("environment.json", "report.html", "manifest.json", "optimizer.pt", ".alignflow.json", "README.md")
"""Files that hold times, versions or an id: their presence counts, their content does not."""

AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate", "os.utime")
TRAIN = """\
generator: {path: shapes, device: cpu}
prompts: {train: "shapes:train", heldout: "shapes:heldout", limit: 8}
rollout: {prompts: 2, group: 2, sampler: {steps: 2}}
reward: {kind: "benchmarks.kill:red"}
recipe: {kind: nft}
train: {steps: 3, lr: 0.01}
evaluate: {every: 2, prompts: 2, sampler: {steps: 2}}
samples: {every: 0, count: 2}
checkpoint: {every: 1, keep: 2}
"""
SEARCH = """\
generator: {path: shapes, device: cpu}
prompts: {source: "shapes:heldout", limit: 3}
reward: {kind: "benchmarks.kill:red"}
search: {kind: best_of_n, sampler: {steps: 2}}
budget: {network_calls: 8}
batch: 1
"""
REWARD = "data: {train: pairs.jsonl}\nfit: {steps: 2, batch: 4}\nhead: {kind: mlp, hidden: 8}\n"


def red(media: Any, prompts: list[str]) -> Any:
    """The share of red: a reward that needs nothing."""
    return media[:, 0].mean(dim=(-1, -2))


# -- the commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A command.

    Args:
        run: does it in a working folder; ``again`` says that it was killed before.
        out: what it writes there.
        prepare: makes what it needs.
        processes: whether it is one that several processes share.
    """

    run: Callable[[Path, bool], object]
    out: str
    prepare: Callable[[Path], object] = lambda folder: None
    processes: bool = False


def _train(folder: Path, again: bool, *, overwrite: bool = False) -> None:
    from align.config.load import load_config
    from align.training.trainer import train

    config = load_config(folder / "train.yaml", [f"out={folder / 'run'}"])
    train(config, resume=again and not overwrite, overwrite=overwrite)


def _overwrite(folder: Path, again: bool) -> None:
    _train(folder, again, overwrite=True)


def _search(folder: Path, again: bool) -> None:
    from align.search.run import run_search
    from align.search.settings import load_search

    run_search(load_search(folder / "search.yaml", [f"out={folder / 'run'}"]), resume=again)


def _reward(folder: Path, again: bool) -> None:
    from align.preference.settings import load_reward_training
    from align.preference.train import train_reward

    config = load_reward_training(folder / "reward.yaml", [f"out={folder / 'reward'}"])
    train_reward(config, overwrite=(folder / "reward").exists())


def _export(folder: Path, again: bool) -> None:
    from align.export import export
    from align.policy.trained import find_policy

    if not (folder / "out").exists():
        export(find_policy(folder / "run"), "diffusers", folder / "out")


def _write(**files: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text)

    return prepare


def _trained(folder: Path) -> None:
    _write(train=TRAIN)(folder)
    _train(folder, False)


def _pairs(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    _write(reward=REWARD)(folder)
    rows = []
    for index in range(8):
        row = {"prompt": f"a circle {index}"}
        for channel, side in enumerate(("chosen", "rejected")):
            pixels = np.full((32, 32, 3), 20 + 10 * index, np.uint8)
            pixels[..., channel] = 200
            Image.fromarray(pixels).save(folder / f"{index}-{side}.png")
            row[side] = f"{index}-{side}.png"
        rows.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")


JOBS = {
    "train": Job(_train, "run", _write(train=TRAIN), processes=True),
    "overwrite": Job(_overwrite, "run", _trained),
    "search": Job(_search, "run", _write(search=SEARCH)),
    "reward": Job(_reward, "reward", _pairs),
    "export": Job(_export, "out", _trained),
}


# -- killing ----------------------------------------------------------------------------------------------------------


def _count_operations(root: Path, fatal: int | None, tally: Path) -> None:
    """Count, from here on, this process's file operations below ``root``; die before number ``fatal`` (from 1)."""
    import safetensors.torch
    import torch

    done, inside = 0, str(root.resolve())

    def operation(what: str) -> None:
        nonlocal done
        done += 1
        if done == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(log, f"{done} {what}\n".encode())

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event not in AUDITED or not args:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        relative = len(args) > 1 and isinstance(args[-1], int) and args[-1] > 2 and event in ("os.remove", "os.rmdir")
        if relative or any(isinstance(arg, str | os.PathLike) and str(arg).startswith(inside) for arg in args):
            operation(f"{event} {args[0]}")

    def before(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            operation(name)
            return function(*args, **kwargs)

        setattr(module, name, counted)

    log = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    before(os, "fsync")
    before(torch, "save")
    before(safetensors.torch, "serialize_file")
    sys.addaudithook(audit)


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
    """Name of every file below a folder -> digest of what of it must be equal; litter stands there by its name."""
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
    """What became of a job's kills."""

    job: str
    world: int
    points: int = 0
    kills: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


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
        self.whole = self._fresh("whole")
        self._must(self._run(self.whole, again=False, fatal=None), "the undisturbed run")
        self.seconds = time.monotonic() - began
        self.operations = self.tally.read_text().splitlines()
        self.result.points = len(self.operations)
        self.expected = content(self.whole / self.job.out)

    def _must(self, codes: list[int], what: str) -> None:
        if any(codes):
            raise SystemExit(f"{self.result.job}: {what} failed with {codes}")

    def _fresh(self, name: str) -> Path:
        folder = self.base / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.base / "template", folder)
        return folder

    def _run(self, folder: Path, *, again: bool, fatal: int | None, delay: float | None = None) -> list[int]:
        def work() -> None:
            os.chdir(folder)
            if not again and os.environ.get("RANK", "0") == "0":
                _count_operations(folder, fatal, self.tally)
            self.job.run(folder, again)

        return forked(work, self.world, delay)

    def at(self, point: int) -> None:
        """Kill before operation ``point`` (from 1), run again, compare."""
        folder = self._fresh("killed")
        codes = self._run(folder, again=False, fatal=point)
        said = self.operations[point - 1].replace(str(self.whole), "") if point <= len(self.operations) else "?"
        self._judge(folder, f"point {point} ({said})", -signal.SIGKILL in codes)

    def after(self, delay: float) -> None:
        """Kill after so many seconds, run again, compare."""
        folder = self._fresh("killed")
        codes = self._run(folder, again=False, fatal=None, delay=delay)
        self._judge(folder, f"after {delay:.2f} s", -signal.SIGKILL in codes)

    def _judge(self, folder: Path, where: str, killed: bool) -> None:
        began = time.monotonic()
        self.result.kills += killed
        codes = self._run(folder, again=True, fatal=None)
        if any(codes):
            self.result.failed.append(f"{where}: run again it ended with {codes}")
            return
        found = content(folder / self.job.out)
        different = sorted(
            name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)
        )
        beside = sorted(entry.name for entry in folder.iterdir() if ".alignflow-" in entry.name)
        if different or beside:
            self.result.failed.append(f"{where}: {', '.join((different + beside)[:4])} differ")
        self.result.seconds += time.monotonic() - began


def main() -> None:
    """Print a line per job, and every failure; leave with 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--every", type=int, default=1, help="only every so many-th operation")
    parser.add_argument("--random", type=int, default=100, help="kills at random moments, over all jobs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import align.export
    import align.policy.trained
    import align.preference.train
    import align.report
    import align.search.run
    import align.training.trainer  # noqa: F401  # so that the forked processes have it

    rng = random.Random(options.seed)
    pairs = [
        (name, world) for name in options.jobs for world in options.processes if world == 1 or JOBS[name].processes
    ]
    failed = 0
    print(f"{'job':10} processes operations kills failed seconds")
    for name, world in pairs:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            trial = Trial(name, Path(folder).resolve() / "trial", world)
            for point in range(1, trial.result.points + 1, options.every):
                trial.at(point)
            for _ in range(-(-options.random // len(pairs))):
                trial.after(rng.uniform(0.0, trial.seconds))
            found = trial.result
            cost = time.monotonic() - began
            print(
                f"{name:10} {world:9} {found.points:10} {found.kills:5} {len(found.failed):6} {cost:7.0f}", flush=True
            )
            for line in found.failed:
                print(f"  {line}")
            failed += len(found.failed)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
