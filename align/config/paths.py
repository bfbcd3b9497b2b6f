"""Paths in settings, written so that they are valid from any working folder. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignflow.worlds.shapes import WORLDS

PLACES = frozenset(
    ("path", "train", "heldout", "source", "file", "lora", "folder", "template", "references", "model",
     "latent_reward", "reference", "pairs", "init", "processor", "weights", "tokenizer", "med_config", "clip",
     "rewrites", "generator_lora", "config", "embeddings")
)  # fmt: skip
"""Names of settings that may hold a file or folder. A value that is not an existing one is left unchanged."""


Named = Callable[[str], str]
"""An existing file or folder, ``~`` replaced -> what is written for it."""


def absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run as plain values, with absolute paths of all existing files and folders and of ``out``."""
    found = named(settings, os.path.abspath)
    if isinstance(found.get("out"), str):
        found["out"] = os.path.abspath(found["out"])
    return found


def named(settings: dict[str, Any], name: Named) -> dict[str, Any]:
    """Settings of a run as plain values, in which every file and folder that exists is written as ``name`` says.

    Of code, ``file.py:name``, the file is named; a module of the working folder becomes its file.
    """
    return {key: _walk(value, name, "reward" in key or key == "gold", key) for key, value in settings.items()}


def _walk(value: Any, name: Named, in_reward: bool, key: str = "") -> Any:
    if isinstance(value, dict):
        return {
            inner: _walk(part, name, in_reward or "reward" in inner or inner == "gold", inner)
            for inner, part in value.items()
        }
    if isinstance(value, list):
        return [_walk(part, name, in_reward, key) for part in value]
    if not isinstance(value, str):
        return value
    place, colon, what = value.rpartition(":")
    if colon and (in_reward or place.endswith(".py")):
        return _code(place, what, name) or value
    return _there(value, name) or value if key in PLACES else value


def _code(place: str, what: str, name: Named) -> str | None:
    """``file.py:what`` with the file's written name, also for a module in the working folder."""
    file = _there(place if place.endswith(".py") else f"{place}.py", name)
    return f"{file}:{what}" if file and (place.endswith(".py") or place.isidentifier()) else None


def _there(value: str, name: Named) -> str | None:
    if value in WORLDS or not value.strip():
        return None
    try:
        place = Path(value).expanduser()
        return name(str(place)) if place.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, nobody's home: a text and no place
        return None
