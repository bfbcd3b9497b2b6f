"""Lock file that lets one process at a time write to a folder; it names its holder and expires with it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.data.files import check_free, writing
from align.runs.owned import LOCK, sweep
from alignflow.errors import RunFolderError
from alignflow.files.disk import aside

HEARTBEAT = 20.0
"""Seconds between two signs of life of a holder."""

STALE = 180.0
"""Seconds without a sign of life after which a holder on another machine counts as gone."""


class Lock:
    """A lock file. Its holder touches it every :data:`HEARTBEAT` seconds, for processes of other machines.

    Args:
        path: the lock file.
        folder: what it protects, for messages.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self._mine: bytes | None = None
        self._over = threading.Event()

    def take(self) -> None:
        """Take the lock, over from a holder that has gone if need be.

        Raises:
            RunFolderError: a living process holds it; names host, process and time.
        """
        content = json.dumps(_me(), indent=2).encode() + b"\n"
        with writing(self.folder):
            for _ in range(8):
                if self._made(content):
                    self._mine = content
                    threading.Thread(target=self._beat, name="lock", daemon=True).start()
                    return
                found = self._read()
                if found is None:
                    continue
                if (holder := self._living(found)) is not None:
                    raise RunFolderError(holder)
                self._retire(found)
        raise RunFolderError(f"{self.folder} is being taken by several processes at once; try again")

    def release(self) -> None:
        """Give the lock back; one that was never taken, or was taken over meanwhile, stays as it is."""
        self._over.set()
        if self._mine is not None and self._read() == self._mine:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._mine = None

    def copy_to(self, folder: Path) -> None:
        """Put the lock into the folder that is about to replace the locked one."""
        assert self._mine is not None
        (folder / self.path.name).write_bytes(self._mine)

    def _made(self, content: bytes) -> bool:
        partial = aside(self.path)
        partial.write_bytes(content)
        try:
            os.link(partial, self.path)  # whole or not there, unlike a file that is opened and then written
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with self.path.open("xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except OSError:
            return None

    def _living(self, content: bytes) -> str | None:
        """The holder of the lock, in words; None if that process has ended."""
        try:
            age = self._now() - self.path.stat().st_mtime
        except OSError:
            return None
        try:
            holder = json.loads(content)
            pid, host, since = int(holder["pid"]), str(holder["host"]), str(holder["time"])
        except (ValueError, KeyError, TypeError):
            said = (
                f"{self.folder} is locked by {self.path.name}, which cannot be read; delete it if no process "
                "uses the folder"
            )
            return None if age > STALE else said
        here = all(holder.get(key) == _me()[key] for key in ("host", "boot", "space"))
        if (_started(pid) != holder.get("started")) if here else (age > STALE):
            return None
        said = f"{self.folder} is in use by process {pid} on {host} since {since}"
        if here:
            return f"{said}; wait for it, stop it, or choose another folder with --out"
        return f"{said}; if that process has ended, try again in {STALE:.0f} s or delete {self.path}"

    def _now(self) -> float:
        """The time by the clock that gives files of this folder theirs, which this machine's may not agree with."""
        probe = aside(self.path)
        try:
            probe.write_bytes(b"")
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def _retire(self, content: bytes) -> None:
        """Remove the lock of a holder that has gone, unless another process did so first and holds it now."""
        old = aside(self.path)
        try:
            os.rename(self.path, old)
        except FileNotFoundError:
            return
        if old.read_bytes() != content:
            with contextlib.suppress(OSError):
                os.link(old, self.path)
        old.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def in_use(folder: Path) -> bool:
    """Whether a living process holds the lock of a run folder."""
    lock = Lock(folder / LOCK, folder)
    found = lock._read()
    return found is not None and lock._living(found) is not None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold, for the length of a block, the lock beside a folder that is written as a whole at the block's end.

    Raises:
        RunFolderError: another process writes the same folder.
    """
    path = Path(os.path.abspath(path))
    lock = Lock(path.with_name(f".{path.name}{LOCK}"), path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock.take()
    try:
        sweep(path.parent, path.name, lock.path.name)
        yield
    finally:
        lock.release()


def check_unwritten(path: Path, flag: str = "--out") -> None:
    """:func:`~align.data.files.check_free`, once what a killed command left beside the folder is removed.

    Raises:
        RunFolderError: ``path`` holds something, or another process writes it.
    """
    if path.parent.is_dir():
        with locked(path):
            check_free(path, flag)
    else:
        check_free(path, flag)


def _me() -> dict[str, Any]:
    """This process, as other processes can recognise it."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _started(pid),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "space": _link("/proc/self/ns/pid"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _started(pid: int) -> str | None:
    """When a process of this machine started, in any unit; None if there is none or it is dead already."""
    if stat := _text(f"/proc/{pid}/stat"):
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
