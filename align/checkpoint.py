"""Checkpoints: complete, atomic, rotated, checked before they are read.

``step-000030/`` holds ``roles.safetensors`` (policy, old, ref, ema), ``optimizer.pt`` (RNG states and what the reward
has learnt too; read with ``weights_only``), what others load (``pytorch_lora_weights.safetensors``, or
``transformer/`` where all weights are trained), and ``manifest.json``: counters (the data position and the learning
rate follow from them), versions of the roles, and size and SHA-256 of every file. It appears in one rename.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from align.errors import CheckpointError
from align.files import new_folder, write_json
from align.roles import Roles
from align.stepping import Stepper
from rewards.base import Refreshed

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")


def save(
    folder: Path,
    step: int,
    roles: Roles,
    optimizer: Stepper,
    counters: dict[str, Any],
    keep: int,
    export: Callable[[Path], None] = lambda folder: None,
    refreshed: Refreshed | None = None,
) -> Path:
    """Write ``folder/step-NNNNNN`` and drop all but the newest ``keep``.

    Args:
        counters: JSON numbers the trainer needs to go on (steps, updates, seconds, network calls).
        export: writes into the checkpoint what other programs load.
        refreshed: what of the reward learns beside the policy.

    Raises:
        RunFolderError: it cannot be written (full disk); the checkpoints before it are intact.
    """
    path = folder / f"step-{step:06d}"
    with new_folder(path) as staging:
        tensors = {name: value.detach().cpu().contiguous() for name, value in roles.tensors().items()}
        try:
            save_file(tensors, staging / "roles.safetensors")
            state = {**optimizer.state_dict(), "rng": _rng_state()}
            if refreshed is not None:
                state["reward"] = refreshed.state_dict()
            torch.save(state, staging / "optimizer.pt")
            export(staging)
        except (SafetensorError, RuntimeError) as error:  # how these libraries tell of a full disk
            raise OSError(str(error).splitlines()[0]) from error
        files = {str(file.relative_to(staging)): _digest(file) for file in sorted(staging.rglob("*")) if file.is_file()}
        manifest = {"format": FORMAT, "step": step, "counters": counters, "roles": roles.versions(), "files": files}
        write_json(staging / "manifest.json", manifest)
    for old in list_steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:06d}")
    return path


def list_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder``, rising."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None. Leftovers of an interrupted write are hidden and never count."""
    steps = list_steps(folder)
    return folder / f"step-{steps[-1]:06d}" if steps else None


def load(
    path: Path, roles: Roles, optimizer: Stepper | None = None, refreshed: Refreshed | None = None
) -> dict[str, Any]:
    """Put a checkpoint's state into ``roles``, ``optimizer`` and ``refreshed``; returns its counters.

    Raises:
        CheckpointError: files missing, truncated or altered, or made for another model or policy. Nothing has been
            changed then.
    """
    manifest = verify(path)
    try:
        tensors = load_file(path / "roles.safetensors")
        state = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error}); {_remedy(path)}") from None
    known = {"policy", *roles.values}  # who evaluates needs no role that only training has
    tensors = {name: value for name, value in tensors.items() if name.partition("/")[0] in known}
    _check_same_model(path, tensors, roles)
    if refreshed is not None and "reward" not in state:
        raise CheckpointError(f"checkpoint {path} holds no reward that learns; use the config it was made with")
    roles.load(tensors, manifest["roles"])
    if optimizer is not None:
        optimizer.load_state_dict(state)
        _restore_rng(state["rng"])
    if refreshed is not None:
        refreshed.load_state_dict(state["reward"])
    return manifest["counters"]


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: one is missing, truncated or altered.
    """
    manifest = _read_manifest(path)
    for name, digest in manifest["files"].items():
        if not (path / name).is_file() or _digest(path / name) != digest:
            raise CheckpointError(f"checkpoint {path}: {name} is damaged or missing; {_remedy(path)}")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no manifest.json")
    try:
        manifest = json.loads(file.read_text())
    except json.JSONDecodeError:
        raise CheckpointError(f"checkpoint {path}: manifest.json is damaged; {_remedy(path)}") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {manifest.get('format')}; this version reads {FORMAT}")
    return manifest


def _remedy(path: Path) -> str:
    return f"delete {path.name} to resume from the checkpoint before it"


def _check_same_model(path: Path, tensors: dict[str, torch.Tensor], roles: Roles) -> None:
    mine = {name: tuple(value.shape) for name, value in roles.tensors().items()}
    theirs = {name: tuple(value.shape) for name, value in tensors.items()}
    different = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
    if different:
        name = min(different)
        raise CheckpointError(
            f"checkpoint {path} belongs to another model or policy: {len(different)} tensors differ, "
            f"first {name} ({theirs.get(name, 'absent')} there, {mine.get(name, 'absent')} here); "
            "use the config it was made with"
        )


def _digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _rng_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
