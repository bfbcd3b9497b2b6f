"""External text (file names, error messages, server replies), cleaned for a terminal and a page."""

from __future__ import annotations

import re
import unicodedata

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_KEPT = "\n\t"


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
