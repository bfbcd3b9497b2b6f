"""One finding on a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """A finding and its remedy.

    Args:
        name: the thing, such as ``driver``.
        state: ``ok``; ``note`` where something could be better or is missing for some runs; ``blocks`` where training
            on this machine fails, or leaves its card unused.
        found: what is there, in a few words.
        advice: one sentence on what to do; empty for ``ok``.
    """

    name: str
    state: Literal["ok", "note", "blocks"]
    found: str
    advice: str = ""
