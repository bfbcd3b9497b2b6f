"""Atomic file writes, with the permissions of the process's umask."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

LITTER = re.compile(r"\.(?P<name>.+)\.alignflow-[0-9a-f]{12}")
"""Names of :func:`aside`: what an interrupted write leaves behind, and nothing else."""


def aside(path: Path) -> Path:
    """A new hidden name beside ``path``, for what becomes ``path`` once it is whole or goes once it was replaced."""
    return path.with_name(f".{path.name}.alignflow-{secrets.token_hex(6)}")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step; raises OSError, and the old file is then as it was."""
    partial = aside(path)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
