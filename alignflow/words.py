"""Words of messages: lists of names that are never too long, numbers of things, settings on one line."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = 80

KINDS = ", which alignflow recipes lists"
MOST = 12  # names that are listed whole


def close(given: object, known: Iterable[str], count: int = 1) -> list[str]:
    """The ``known`` names that look most like what was given, best first; none where nothing does."""
    return difflib.get_close_matches(str(given)[:100], list(known), n=count, cutoff=0.6)


def listing(names: Iterable[str], given: object = None, more: str = "") -> str:
    """Names with commas between; of many, those nearest to what was ``given`` and the first, and how many more.

    Args:
        more: text after that number, where the others are listed.
    """
    known = list(names)
    if len(known) <= MOST:
        return ", ".join(known)
    first = list(dict.fromkeys([*close(given, known, 3), *known]))[: MOST - 4]
    return f"{', '.join(first)} and {len(known) - len(first)} more{more}"


def brief(value: object, limit: int = 80) -> str:
    """``repr`` of a value of any size, cut, without making the whole."""
    try:
        return f"{_REPR.repr(value):.{limit}}"
    except Exception:  # a number of too many digits, or a class of the user's own
        return f"a {type(value).__name__}"


def count(number: int, word: str) -> str:
    """``1 prompt``, ``2 prompts``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def one_line(settings: Mapping[str, object]) -> str:
    """``nft beta=1.0 kl=0.1``."""
    rest = " ".join(f"{key}={value}" for key, value in settings.items() if key != "kind")
    return f"{settings.get('kind', '')} {rest}".strip()


def reward_lines(settings: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(name, settings) of a reward's line in a report; a mixture adds a line per part: its name, kind and scale."""
    if settings is None:
        return [("reward", "none")]
    parts = settings.get("parts")
    if settings["kind"] != "mixture" or not isinstance(parts, dict):
        return [("reward", one_line(settings))]
    found = [("reward", one_line({name: value for name, value in settings.items() if name != "parts"}))]
    for name, part in parts.items():
        scale = {key: value for key, value in part.items() if key != "reward"}
        found.append(("", f"{name}: {one_line(part['reward'])}, {one_line(scale)}"))
    return found
