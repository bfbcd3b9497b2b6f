"""Requirements on several machines, checked before weights are loaded: a shared run folder, synchronised clocks.

No result of a run depends on a clock; the times in its logs do. So clocks that differ are reported, and the run goes
on. A run folder that the machines do not share ends it.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from align.runs.processes import Processes
from alignflow.errors import TrainingError
from alignflow.files.disk import aside, write_bytes

APART = 5.0
"""Seconds that clocks may differ without a word."""
WAIT = 20.0
"""Seconds in which a file that one machine has written must be there on the others."""


def check(folder: Path, processes: Processes, say: Callable[[str], None]) -> None:
    """Compare the machines of a run; every process must call it. Nothing is done where there is one machine.

    Args:
        folder: the run folder, which is there in the main process.
        say: takes a line for the user about clocks that differ.

    Raises:
        TrainingError: a machine does not see what the main process writes into the folder.
    """
    hosts = processes.objects([_machine()])
    if len({*hosts}) == 1:
        return
    names = [host for host, _ in hosts]
    processes.objects([None])  # together from here on
    if line := clocks(names, processes.objects([time.time()])):
        say(line)
    storage(folder, names, processes)


def clocks(hosts: list[str], times: list[float]) -> str:
    """A sentence on the machine whose clock differs most from the main one's, '' where none differs by :data:`APART`.

    Args:
        hosts: machine of every process.
        times: seconds since the epoch that each read at one moment.
    """
    rank = max(range(len(times)), key=lambda rank: abs(times[rank] - times[0]))
    gap = times[rank] - times[0]
    if abs(gap) <= APART:
        return ""
    way = "ahead of" if gap > 0 else "behind"
    said = f"the clock of {hosts[rank]} is {abs(gap):.0f} s {way} that of {hosts[0]}"
    return f"{said}: no result depends on it, but times in logs do; synchronise the machines' clocks (NTP)"


def storage(folder: Path, hosts: list[str], processes: Processes) -> None:
    """Let every process read what the main one writes into a folder: a new file, and then the file in its place.

    Raises:
        TrainingError: names the process, its machine, and what it does not see.
    """
    place = folder / processes.sent(aside(folder / "shared").name, 0)
    try:
        for words in ("does not see a new file", "reads the old content of a file that was replaced"):
            content = processes.settled(lambda: _written(place))
            seen = processes.objects([_sees(place, content)])
            if not all(seen):
                rank = seen.index(False)
                when = f"{WAIT:.0f} s after process 0 on {hosts[0]} wrote it"
                raise TrainingError(
                    f"process {rank} on {hosts[rank]} {words} in {folder}, {when}: all machines need one run folder "
                    "(out) on storage that they share"
                )
    finally:
        if processes.rank == 0:
            place.unlink(missing_ok=True)


def _machine() -> tuple[str, str]:
    """Name of this machine, and what tells it from another one of that name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.exists() else ""


def _written(place: Path) -> str:
    """Put a file in place as everything else is, by renaming it."""
    content = secrets.token_hex(8)
    write_bytes(place, content.encode())
    return content


def _sees(place: Path, content: str) -> bool:
    """Whether the file has the content before :data:`WAIT` seconds have passed."""
    ends = time.monotonic() + WAIT
    while True:
        try:
            if place.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > ends:
            return False
        time.sleep(0.1)
