"""Align image and video generators with rewards.

Submodules load on first use (``align.losses`` imports torch only when touched), so that settings and commands that
need no tensors stay instant.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"align.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"align.{name}":
            raise
        raise AttributeError(f"module 'align' has no attribute {name!r}") from None
