"""Whether all processes of a run have the same config, code and packages, before any weights are loaded."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path

from align.config.load import resolved_settings
from align.config.settings import Config
from align.runs.environment import environment
from align.runs.identity import flatten
from align.runs.processes import Processes
from alignflow.errors import TrainingError

ROOMS = ("align", "alignflow", "generators", "rewards")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stated:
    """Config, code and packages of one process.

    Args:
        host: name of its machine.
        settings: dotted path -> value of the resolved config.
        packages: name -> version.
        code: digest of the source files of this package.
    """

    host: str
    settings: dict[str, str]
    packages: dict[str, str]
    code: str


def stated(config: Config) -> Stated:
    """Config, code and packages of this process."""
    settings = {path: str(value) for path, value in flatten(resolved_settings(config)).items()}
    found = environment()
    packages = {name: str(version) for name, version in found["packages"].items()}
    return Stated(socket.gethostname(), settings, {"python": found["python"], **packages}, code_digest(ROOT))


def code_digest(root: Path) -> str:
    """Digest of the names and contents of all source files of the package in ``root``."""
    digest = hashlib.sha256()
    for file in sorted(file for room in ROOMS for file in (root / room).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def check(config: Config, processes: Processes) -> None:
    """Compare what the processes run; every process must call it.

    Raises:
        TrainingError: names the first process that differs from the main one, its machine, and the difference.
    """
    if processes.share.world == 1:
        return
    everyone: list[Stated] = processes.objects([stated(config)])
    for rank, other in enumerate(everyone):
        if found := difference(everyone[0], other):
            raise TrainingError(
                f"process {rank} on {other.host} differs from process 0 on {everyone[0].host}: {found}; start all "
                "processes with the same files, overrides and installation"
            )


def difference(main: Stated, other: Stated) -> str:
    """The differences of two processes in words, '' if there are none."""
    found = []
    for path in sorted(main.settings.keys() | other.settings.keys()):
        here, there = (one.settings.get(path, "not set") for one in (other, main))
        if here != there:
            found.append(f"{path} is {here}, not {there}")
    versions = ((name, other.packages.get(name), main.packages[name]) for name in main.packages)
    found += [f"{name} {here}, not {there}" for name, here, there in versions if here != there]
    if main.code != other.code:
        found.append("the source files of alignflow")
    shown = "; ".join(found[:4])
    return f"{shown}; and {len(found) - 4} more" if len(found) > 4 else shown
