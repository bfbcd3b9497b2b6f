"""Identity of a run or checkpoint: which settings may change on resume, and why the others may not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.data.prompts import Prompt
from generators.settings import Memory

MEMORY_ALONE = (
    "train.chunk",
    "train.gradient_checkpointing",
    "rollout.chunk",
    "rollout.decode_chunk",
    "parallel",
    *(f"memory.{name}" for name in Memory.model_fields if name not in ("quantise", "compute")),
)
"""Settings that change memory and speed, and results by rounding alone: who ran out of memory continues with less."""

FREE_ON_RESUME = (
    "name", "out", "evaluate", "samples", "checkpoint", "trackers", "prompts.heldout", "generator.device",
    "train.steps", "train.threads", "train.lr", "train.schedule", "train.warmup", "train.unscored",
    "rollout.prompts", "rollout.group",
)  # fmt: skip
"""Settings that may change between the parts of a run; those of ``train`` and ``rollout`` affect what follows alone."""

FREE_IN_A_SEARCH = ("name", "out", "samples", "chunk", "decode_chunk", "generator.device", "memory")

FREE_IN_AN_EVOLUTION = ("name", "out", "generator.device", "memory", "parquet")

FREE_IN_A_REASONER = ("name", "out", "device", "method.steps", "method.lr", "measured", "checkpoint")
FREE_IN_A_REWRITER = ("name", "out", "generator.device", "memory", "method.steps", "method.lr", "checkpoint")

BY_CONTENT = {"prompts.train": "data", "prompts.source": "data", "rollout.file": "data", "generator.path": "model"}
"""Settings that name a place: it may be another one if a digest says that the same lies there."""

_REASONS = {
    "seed": "all samples follow from it",
    "generator": "the weights learned so far belong to this model",
    "policy": "the checkpoint's weights have its shape",
    "prompts": "which prompts a step uses follows from them",
    "rollout": "earlier steps were sampled this way, and the samples of a step follow from it",
    "reward": "the weights learned so far are for the other reward",
    "recipe": "the state of the roles follows from it",
    "train": "the optimizer's state follows from it",
    "memory": "it changes the weights themselves",
    "search": "prompts already searched used the other value",
    "budget": "prompts already searched had the other budget",
}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> dotted keys; lists count as values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Dotted key -> [then, now] of every setting that differs."""
    then, today = flatten(before), flatten(now)
    keys = sorted(then.keys() | today.keys())
    return {key: [then.get(key), today.get(key)] for key in keys if then.get(key) != today.get(key)}


def under(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of the names or is below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def refused(changed: Mapping[str, list[Any]], free: Sequence[str]) -> list[str]:
    """A line with the reason for every change that a resumed run cannot make; places are judged by their content."""
    return [
        f"{key}: {then!r} then, {now!r} now ({_REASONS.get(key.partition('.')[0], 'results follow from it')})"
        for key, (then, now) in changed.items()
        if not under(key, free) and key not in BY_CONTENT
    ]


def lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, flat, that every part of a training run shares; a checkpoint keeps them."""
    free = (*FREE_ON_RESUME, *MEMORY_ALONE, *BY_CONTENT)
    return {key: value for key, value in flatten(settings).items() if not under(key, free)}


def data_digest(prompts: Iterable[Prompt]) -> str:
    """Digest of prompts: their texts, their metadata, and names and sizes of the files that they come with."""
    digest = hashlib.sha256()
    for prompt in prompts:
        media = {name: _file(place) for name, place in sorted(prompt.media.items())}
        row = [prompt.text, media, prompt.metadata]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _file(place: Any) -> list[Any]:
    if not isinstance(place, Path):
        return ["a cell of a table"]
    try:
        return [place.name, place.stat().st_size]
    except OSError:
        return [place.name, None]


def model_digest(path: str) -> str:
    """Digest of a model folder: names and sizes of its files, and what its JSON files hold; of a name, the name."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\n".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.hexdigest()
