"""Paths in settings, written so that they are valid from any working folder. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from alignflow.worlds.shapes import WORLDS

PLACES = frozenset(
    ("path", "train", "heldout", "source", "file", "lora", "folder", "template", "references", "model",
     "latent_reward", "reference", "pairs", "init", "processor", "weights", "tokenizer", "med_config", "clip",
     "rewrites", "generator_lora", "config", "embeddings")
)  # fmt: skip
"""Names of settings that may hold a file or folder. A value that is not an existing one is left unchanged."""


def absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run as plain values, with absolute paths of all existing files and folders and of ``out``."""
    found = _walk(settings, in_reward=False)
    if isinstance(found.get("out"), str):
        found["out"] = os.path.abspath(found["out"])
    return found


def _walk(value: Any, in_reward: bool, key: str = "") -> Any:
    if isinstance(value, dict):
        return {
            name: _walk(part, in_reward or "reward" in name or name == "gold", name) for name, part in value.items()
        }
    if isinstance(value, list):
        return [_walk(part, in_reward, key) for part in value]
    if not isinstance(value, str):
        return value
    place, colon, name = value.rpartition(":")
    if colon and (in_reward or place.endswith(".py")):
        return _code(place, name) or value
    return _there(value) or value if key in PLACES else value


def _code(place: str, name: str) -> str | None:
    """``file.py:name`` with an absolute path, also for a module in the working folder."""
    file = _there(place if place.endswith(".py") else f"{place}.py")
    return f"{file}:{name}" if file and (place.endswith(".py") or place.isidentifier()) else None


def _there(value: str) -> str | None:
    if value in WORLDS or not value.strip():
        return None
    try:
        place = Path(value).expanduser()
        return os.path.abspath(place) if place.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, nobody's home: a text and no place
        return None
