"""Paths that people write into configs, tables and command lines."""

from __future__ import annotations

from pathlib import Path


def expanded(path: str | Path, error: type[Exception] = ValueError) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced by the home folder.

    Args:
        error: what is raised where there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(f"{Path(path).parts[0]} is the home folder of nobody on this machine") from None


def is_file(path: Path) -> bool:
    """Whether there is such a file; names that no file can have are no files."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than file systems allow, a NUL inside, a folder that may not be entered
        return False
