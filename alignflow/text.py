"""External text (file names, error messages, server replies), cleaned for a terminal and a page."""

from __future__ import annotations

import re
import sysconfig
import traceback
import unicodedata
from pathlib import Path

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_KEPT = "\n\t"
_OURS = tuple(str(Path(__file__).parents[1] / name) for name in ("align", "alignflow", "generators", "rewards"))
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def printable(text: object, limit: int = 2000) -> str:
    """``text`` without terminal escapes, control characters and lone surrogates, cut to ``limit`` characters.

    Newlines and tabs stay. Bidirectional overrides, which reorder what a terminal shows, are written as escapes.
    """
    cleaned = _ESCAPES.sub("", str(text))
    shown = "".join(c if c in _KEPT or unicodedata.category(c) not in ("Cc", "Cs") else "?" for c in cleaned)
    shown = re.sub("[\u202a-\u202e\u2066-\u2069]", lambda match: f"\\u{ord(match[0]):04x}", shown)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an exception's message, printable; the exception's class where it has no message."""
    lines = printable(error).strip().splitlines()
    return printable(lines[0], limit) if lines else type(error).__name__


def line_of(error: BaseException) -> str:
    """``my_reward.py, line 12``: the last line of code of the user's that led to an exception; empty if there is none.

    Lines of this project are left out, and those of installed packages where code that is not installed called them.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[:1] != "<"]
    users = [frame for frame in frames if not _below(frame.filename, _OURS)]
    own = [frame for frame in users if not _below(frame.filename, _INSTALLED)]
    return next((f"{Path(frame.filename).name}, line {frame.lineno}" for frame in [*own[-1:], *users[:1]]), "")


def _below(file: str, folders: tuple[str, ...]) -> bool:
    return any(file.startswith(f"{folder}{sep}") for folder in folders for sep in "/\\")
