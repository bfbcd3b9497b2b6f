"""Folders and files that alignflow made and may remove: those with its marker, and its own temporary files."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.data.files import check_free, write_json, writing
from alignflow.errors import RunFolderError
from alignflow.files.disk import LITTER

MARK = ".alignflow.json"
LOCK = ".alignflow-lock"

TRAINING, SEARCH, NOISE = "training run", "search", "noise LoRA"
PAIRS = "preference pairs"
EVOLUTION, REWRITER, JOINT = "evolution of prompts", "rewriter", "joint training"
REWARD, LATENT, JUDGE = "trained reward", "latent reward", "judge's LoRA"
REASONER = "judge that reasons"
SWEEP = "sweep"

_RUN = ("config.yaml", "environment.json", "report.html", "samples", MARK, LOCK)
_TRACKERS = ("wandb", "mlruns", "mlflow", ".aim", "trackio", "dvclive", "swanlog", "tensorboard", "runs")
_TRAINED = ("config.yaml", "metrics.jsonl", "summary.json", "README.md", MARK)

NAMES: Mapping[str, tuple[str, ...]] = {
    TRAINING: (*_RUN, *_TRACKERS, "metrics.jsonl", "summary.json", "checkpoints", "lora", "prompts", "export",
               "transformer", "transformer_2", "README.md", "held_out"),
    SEARCH: (*_RUN, "candidates", "results.json"),
    EVOLUTION: (*_RUN, "evolved", "rewrites.jsonl", "rewrites.parquet", "best.jsonl", "summary.json"),
    JOINT: (*_RUN, "stages", "summary.json"),
    REWRITER: (*_RUN, "metrics.jsonl", "summary.json", "collected", "rewrites.jsonl", "checkpoint",
               "held_out_plain.jsonl", "held_out_before.jsonl", "held_out_after.jsonl",
               "adapter_config.json", "adapter_model.safetensors", "README.md"),
    REASONER: (*_RUN, "metrics.jsonl", "summary.json", "collected", "checkpoint", "held_out_before.jsonl",
               "held_out_after.jsonl", "adapter_config.json", "adapter_model.safetensors", "README.md"),
    REWARD: (*_TRAINED, "checkpoint", "reward.json", "head.safetensors", "gram.safetensors", "backbone.safetensors"),
    LATENT: (*_TRAINED, "latent.json", "latent.safetensors"),
    JUDGE: (*_TRAINED, "adapter_config.json", "adapter_model.safetensors"),
    PAIRS: (MARK, "scored.jsonl", "pairs.parquet", "media"),
    NOISE: (MARK, "pytorch_lora_weights.safetensors", "pytorch_lora_weights_transformer_2.safetensors"),
}  # fmt: skip
"""Kind of folder -> what it holds at its top; anything else was put there by someone and is never removed."""

_OLD_LITTER = re.compile(r"\.step-\d{6,}\.[a-z0-9_]{8}|\.pytorch_lora_weights\w*\.safetensors\.\d+")


def mark(folder: Path, kind: str, **about: Any) -> None:
    """Mark a folder as made by alignflow; ``id`` distinguishes it from every other one."""
    write_json(folder / MARK, {"kind": kind, "id": uuid.uuid4().hex, **about})


def read_mark(folder: Path) -> dict[str, Any]:
    """The mark of a folder; empty if it has none, ``kind`` alone where it is of a version without marks."""
    found = _json(folder / MARK)
    if isinstance(found.get("kind"), str):
        return found
    kind = _kind_without_mark(folder)
    return {"kind": kind} if kind else {}


def _kind_without_mark(folder: Path) -> str:
    if (folder / "config.yaml").is_file():
        packages = _json(folder / "environment.json").get("packages")
        if isinstance(packages, dict) and "alignflow" in packages:
            return SEARCH if (folder / "candidates").is_dir() else TRAINING
        if (folder / "adapter_config.json").is_file() and (folder / "summary.json").is_file():
            return JUDGE
    for name, kind in (("reward.json", REWARD), ("latent.json", LATENT)):
        if str(_json(folder / name).get("format", "")).startswith("alignflow-"):
            return kind
    return ""


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def entries(folder: Path) -> set[str]:
    """Names in a folder, without the lock and the litter of interrupted writes."""
    return {entry.name for entry in folder.iterdir() if entry.name != LOCK and not _is_litter(entry.name)}


def check_removable(path: Path, kind: str) -> None:
    """Raise RunFolderError unless the folder ``path`` is one of ``kind`` that alignflow made, and holds nothing else.

    A link, the working folder, the home folder, what is around them, and mount points are never removed.
    """
    if path.is_symlink():
        raise RunFolderError(f"{path} is a link to {os.readlink(path)}; --overwrite removes a folder, not a link")
    if not path.is_dir():
        raise RunFolderError(f"{path} is not a folder; --overwrite removes only what alignflow made")
    real = path.resolve()
    for what, place in (("working", Path.cwd()), ("home", Path.home())):
        if place.resolve().is_relative_to(real):
            raise RunFolderError(f"{path} is or contains the {what} folder: --overwrite does not remove it")
    if os.path.ismount(real):
        raise RunFolderError(f"{path} is a mount point: --overwrite does not remove it; choose another with --out")
    found = read_mark(path)
    if found.get("kind") != kind:
        is_not = f"is a {found['kind']}, not a {kind}" if found else f"exists and is not a {kind} that alignflow made"
        raise RunFolderError(f"{path} {is_not}; choose another folder with --out")
    known = {*NAMES[kind], *([str(found["name"])] if "name" in found else [])}
    if strangers := sorted(entries(path) - known):
        names = ", ".join(strangers[:4]) + (f" and {len(strangers) - 4} more" if len(strangers) > 4 else "")
        raise RunFolderError(
            f"{path} holds {names}, which alignflow did not write; move it away, or choose another folder with --out"
        )


def check_out(path: Path, kind: str, *, overwrite: bool) -> None:
    """Raise RunFolderError unless a folder of ``kind`` can be written at ``path``, in place of an older one or not."""
    with writing(path):
        if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
            if not overwrite:
                raise RunFolderError(f"{path} exists; --overwrite replaces it, or give another out")
            check_removable(path, kind)
        else:
            check_free(path)


def sweep(folder: Path, *names: str) -> None:
    """Remove the litter of interrupted writes from a folder, by name: links and all other entries stay.

    Args:
        names: only what was to become one of these entries; everything where none is named.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for entry in list(folder.iterdir()):
        if entry.is_symlink() or not _is_litter(entry.name):
            continue
        found = LITTER.fullmatch(entry.name)
        if names and (found is None or found["name"] not in names):
            continue
        remove(entry)


def remove(entry: Path) -> None:
    """Remove a file or folder that is known to be alignflow's own; what has gone already is no error."""
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _is_litter(name: str) -> bool:
    return bool(LITTER.fullmatch(name) or _OLD_LITTER.fullmatch(name))
