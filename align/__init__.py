"""Align image and video generators with rewards.

Submodules load on first use, so that settings and commands without tensors start at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def _check_packages() -> None:
    """Say so where a file of the user's hides one of our packages, as under ``python -m`` and launchers."""
    root = Path(__file__).resolve().parent.parent
    for name in ("alignflow", "generators", "rewards"):
        spec = importlib.util.find_spec(name)
        where = spec.origin if spec is not None else None
        if where is None or Path(where).resolve().parent != root / name:
            said = f"{where} hides alignflow's package {name}: rename it, or start with alignflow launch"
            if sys.argv[:1] == ["-m"]:  # python -m align.cli: a sentence instead of a traceback
                print(f"error: {said}", file=sys.stderr)
                sys.exit(2)
            raise ImportError(said)


_check_packages()


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"align.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"align.{name}":
            raise
        raise AttributeError(f"module 'align' has no attribute {name!r}") from None
