"""Checks of user-given paths; a name that no file system can hold does not exist and raises nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def expanded(path: str | Path, error: type[Exception] = ValueError) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced by the home folder.

    Args:
        error: class of the error for an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(f"{Path(path).parts[0]} is not the home folder of a user of this machine") from None


def exists(path: str | Path) -> bool:
    """Whether something is there."""
    return _asked(os.path.exists, path)


def is_file(path: str | Path) -> bool:
    """Whether a file is there."""
    return _asked(os.path.isfile, path)


def is_dir(path: str | Path) -> bool:
    """Whether a folder is there."""
    return _asked(os.path.isdir, path)


def names(folder: str | Path, ending: str = "") -> list[str]:
    """Sorted names in a folder that end so; none where it cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder or ".") if name.endswith(ending))
    except (OSError, ValueError):
        return []


def unwritable(path: str | Path) -> str:
    """The reason why nothing can be written under this name, or nothing: ``its name is longer than 255 bytes``."""
    text = str(path)
    if not text.strip():
        return "it is empty"
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return "it holds a NUL or half a character"
    if len(os.fsencode(os.path.abspath(text))) > 4000:
        return "it is longer than 4,000 bytes"
    if any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        return "a name in it is longer than 255 bytes"
    whole = Path(os.path.abspath(os.path.expanduser(text)))
    if whole == Path(whole.anchor):
        return "it is the root of the file system"
    for part in (whole, *whole.parents):
        if exists(part):
            return "" if is_dir(part) else f"{part} is a file"
    return ""


def _asked(question: Callable[[str | Path], bool], path: str | Path) -> bool:
    try:
        return question(path)
    except (OSError, ValueError):
        return False
