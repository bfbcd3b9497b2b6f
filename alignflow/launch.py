"""Launch of one command in several processes: started, signalled and ended together, with one exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, NamedTuple

from alignflow.cores import threads_each

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
PATIENCE = 30.0
"""Seconds that the other processes have to end by themselves after one failed."""
_START = "import sys; sys.argv[0] = 'alignflow'; from align.cli.app import main; main()"


@dataclass(frozen=True)
class Process:
    """A command to start, and the environment variables that it has beside those of this process."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Ended(NamedTuple):
    """Result of the processes: one exit code, and the signal that was passed on to them, if one was."""

    code: int
    signal: int | None = None


def launch(
    words: Sequence[str], processes: int, *, port: int = 0, host: str = "127.0.0.1", nodes: int = 1, node: int = 0
) -> int:
    """Run ``alignflow WORDS`` as ``processes`` processes on this machine, as torch.distributed expects them.

    They do not import from the working folder (``python -P``), so a file of the user's hides no package.

    Args:
        port: of the first machine, where the processes meet; 0 = a free one, for one machine.
        host: the first machine's address.
        nodes: machines that start as many processes each; ``node`` is this one's number.

    Returns:
        0 where every process ended with 0, else the code of the first that did not; 128 + N for signal N.
    """
    started = ranks(words, processes, port=port, host=host, nodes=nodes, node=node)
    return supervise(started, first=node * processes).code


def ranks(
    words: Sequence[str], processes: int, *, port: int = 0, host: str = "127.0.0.1", nodes: int = 1, node: int = 0
) -> list[Process]:
    """The processes of :func:`launch`."""
    shared = {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port or _free_port()),
        "WORLD_SIZE": str(processes * nodes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_each(processes)) if processes > 1 else ""),
    }
    environment = {name: value for name, value in shared.items() if value}
    numbers = [{"RANK": str(node * processes + rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [Process(command_of(words), {**environment, **number}) for number in numbers]


def command_of(words: Sequence[str]) -> list[str]:
    """The command that runs ``alignflow WORDS`` with this Python."""
    return [sys.executable, "-P", "-c", _START, *words]


def supervise(processes: Sequence[Process], *, first: int = 0, output: IO[bytes] | None = None) -> Ended:
    """Start processes, pass signals on to them, and wait until all have ended.

    Args:
        first: rank of the first one.
        output: file that takes what they print; None = where this process prints.
    """
    children: list[subprocess.Popen[bytes]] = []
    passed: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        passed.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    known = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, forward) for number in known}
    try:
        for process in processes:
            environment = {**os.environ, **process.environment}
            children.append(
                subprocess.Popen(
                    list(process.command), env=environment, start_new_session=True, stdout=output, stderr=output
                )
            )
        return Ended(_wait(children, first), next(iter(passed), None))
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]], first: int) -> int:
    """Wait for all; after a failure the others are asked to end, and ended when they do not.

    Args:
        first: rank of the first child.
    """
    code, asked = 0, 0.0
    while None in (codes := [child.poll() for child in children]):
        time.sleep(0.1)
        failed = [found for found in codes if found]
        if failed and not asked:
            code, asked = failed[0], time.monotonic()
            _say(first + codes.index(code), code, len(children) - 1)
            for child in children:
                if child.poll() is None:
                    child.terminate()
        if asked and time.monotonic() > asked + PATIENCE:
            for child in children:
                child.kill()
    code = code or next((child.returncode for child in children if child.returncode), 0)
    return code if code >= 0 else 128 - code


def _say(rank: int, code: int, others: int) -> None:
    """Name the process that a signal ended; one that ended by itself has printed its reason."""
    if code < 0 and -code not in (signal.SIGINT, signal.SIGTERM):
        name = signal.Signals(-code).name
        why = " (out of memory is the usual cause)" if name == "SIGKILL" else ""
        ending = f"; ending the other {others} here" if others else ""
        line = f"error: process {rank} on {socket.gethostname()} was ended by {name}{why}{ending}"
        print(f"{line}; --resume continues from the last checkpoint", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
