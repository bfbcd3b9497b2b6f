"""Checkpoints: complete, atomic, rotated, verified before they are loaded.

``step-000030/`` holds ``roles.safetensors`` (``learner/role/parameter``: every learner's policy and copied roles),
``optimizer.pt`` (state of each learner's optimizer, of the random generators and of a reward that learns; read with
``weights_only``), what others load (``pytorch_lora_weights.safetensors``,
or ``transformer/`` where all weights are trained), and ``manifest.json``: counters (the data position and the learning
rate follow from them), versions of the roles, whose checkpoint it is, and digests of all that. It appears in one
rename, and goes in one.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file

from align.data.files import new_folder
from align.policy import shards
from align.policy.roles import Roles
from align.runs import manifest, old_layout
from align.runs.manifest import DamagedError, latest, list_steps
from alignflow.errors import CheckpointError
from alignflow.files import tensor_files
from alignflow.files.disk import aside
from alignflow.text import first_line
from rewards.base import Refreshed

__all__ = ["latest", "list_steps", "load", "rotate", "save", "verify"]


class Continued(Protocol):
    """The state of a learner's optimizer: an :class:`align.training.stepping.Stepper`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def load_counters(self, counters: dict[str, Any]) -> None: ...


def save(
    folder: Path,
    step: int,
    roles: Mapping[str, Roles],
    steppers: Mapping[str, Continued],
    counters: dict[str, Any],
    export: Callable[[Path], None] = lambda folder: None,
    refreshed: Refreshed | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``folder/step-NNNNNN``.

    Args:
        roles: learner -> its roles, ``steppers`` its optimizer.
        counters: plain values with which the trainer continues (step, each learner's updates, seconds, network calls).
        export: writes into the checkpoint what other programs load.
        refreshed: what of the reward learns beside the policy.
        identity: whose checkpoint it is, as plain values; :func:`load` compares.

    Raises:
        RunFolderError: it cannot be written (full disk); the checkpoints before it are intact.
    """
    path = folder / f"step-{step:06d}"
    tensors, learners = gathered(roles, steppers)
    with new_folder(path, replaces=True) as staging:
        try:
            tensor_files.save(staging / "roles.safetensors", tensors)
            state: dict[str, Any] = {"learners": learners}
            state["rng"] = rng_state()
            if refreshed is not None:
                state["reward"] = refreshed.state_dict()
            torch.save(state, staging / "optimizer.pt")
            export(staging)
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(first_line(error)) from error
        versions = {name: one.versions() for name, one in roles.items()}
        about = {"step": step, "counters": counters, "roles": versions, "identity": dict(identity or {})}
        manifest.write(staging, about)
    return path


def gathered(
    roles: Mapping[str, Roles], steppers: Mapping[str, Continued], keep: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Whole tensors of every role, and the states of every optimizer, on the CPU.

    Where weights are sharded every process must call it, those that do not write with ``keep`` off: nothing stays.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value in _tensors(roles).items():
        found = shards.whole(value)
        if keep:
            tensors[name] = found.cpu().contiguous()
    states = {name: shards.gathered(one.state_dict()) for name, one in steppers.items()}
    return tensors, states if keep else {}


def rotate(folder: Path, keep: int, best: int | None = None) -> None:
    """Drop all checkpoints but the newest ``keep``, and the one of step ``best``."""
    for old in list_steps(folder)[:-keep]:
        if old != best:
            gone = aside(folder / f"step-{old:06d}")
            os.replace(folder / f"step-{old:06d}", gone)
            shutil.rmtree(gone, ignore_errors=True)


def _tensors(roles: Mapping[str, Roles]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value for name, one in roles.items() for key, value in one.tensors().items()}


def load(
    path: Path,
    roles: Mapping[str, Roles],
    steppers: Mapping[str, Continued] | None = None,
    refreshed: Refreshed | None = None,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put a checkpoint's state into the learners' ``roles`` and ``steppers``, and ``refreshed``; returns its counters.

    Args:
        steppers: None if the run is not continued; evaluation also needs fewer learners and roles than training.
        identity: of the run that continues from it; None accepts any run's.

    Raises:
        CheckpointError: files missing, truncated or altered, made for another model or policy, or another run's. The
            roles have not been changed then.
    """
    about = verify(path)
    try:
        tensors = load_file(path / "roles.safetensors")
        state = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a damaged file may raise, unpickling errors among it
        raise CheckpointError(f"checkpoint {path} cannot be read ({first_line(error)}); {_remedy(path)}") from None
    if about["format"] < manifest.SEVERAL:
        anchor = any("anchor" in one for one in roles.values())
        about, tensors, state = old_layout.converted(about, tensors, state, anchor)
    needs = {f"{name}/{role}" for name, one in roles.items() for role in ("policy", *one.values)}
    versions = {f"{name}/{role}" for name, one in about["roles"].items() for role in one}
    stored = {_role_of(name) for name in tensors} & versions
    tensors = {name: value for name, value in tensors.items() if _role_of(name) in needs}
    _check_same_model(path, tensors, {k: value for k, value in _tensors(roles).items() if _role_of(k) in stored})
    if identity is not None:
        _check_same_run(path, about.get("identity", {}), identity)
    if missing := sorted(needs - stored):
        said = missing[0].removeprefix("policy/")
        raise CheckpointError(f"checkpoint {path} does not hold the role {said}; use the config it was made with")
    _load_state(path, state, dict(about["counters"]), steppers, refreshed)
    for name, one in roles.items():
        mine = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        one.load(mine, about["roles"][name])
    return dict(about["counters"])


def _load_state(
    path: Path,
    state: Any,
    counters: dict[str, Any],
    steppers: Mapping[str, Continued] | None,
    refreshed: Refreshed | None,
) -> None:
    needed = [*(["learners", "rng"] if steppers is not None else []), *(["reward"] if refreshed is not None else [])]
    if not isinstance(state, dict) or not set(needed) <= state.keys():
        what = "no reward that learns" if refreshed is not None else "no optimizer"
        raise CheckpointError(f"checkpoint {path} holds {what}; use the config it was made with")
    try:
        if steppers is not None:
            restore_rng(state["rng"])
        for name, stepper in (steppers or {}).items():
            stepper.load_state_dict(state["learners"][name])
            stepper.load_counters(counters["learners"][name])
        if refreshed is not None:
            refreshed.load_state_dict(state["reward"])
    except Exception as error:
        said = f"optimizer.pt does not fit this run ({first_line(error)})"
        raise CheckpointError(f"checkpoint {path}: {said}; {_remedy(path)}") from None


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: one is missing, truncated or altered; names a checkpoint before it that is intact.
    """
    try:
        return _verified(path)
    except DamagedError as error:
        if not (path / "manifest.json").exists():
            raise CheckpointError(f"{path} is not a checkpoint: it has no manifest.json; {_remedy(path)}") from None
        raise CheckpointError(f"checkpoint {path}: {error}; {_remedy(path)}") from None


def _verified(path: Path) -> dict[str, Any]:
    found = manifest.read(path)
    manifest.check_files(path, found)
    return found


def _remedy(path: Path) -> str:
    """How to continue without a checkpoint."""
    match = manifest.NAME.fullmatch(path.resolve().name)
    for step in reversed(list_steps(path.resolve().parent) if match else []):
        older = path.resolve().parent / f"step-{step:06d}"
        if match is None or step >= int(match[1]):
            continue
        try:
            _verified(older)
        except DamagedError:
            continue
        return f"delete {path.name} to resume from the checkpoint before it that is intact, {older.name}"
    return "no earlier checkpoint is intact: delete it to start again with --resume"


def _check_same_run(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Check the owner of a checkpoint; one without this field, of an older version, is accepted."""
    known = [name for name in ("data", "model", "run") if theirs.get(name) and mine.get(name)]
    settings = theirs.get("settings")
    if isinstance(settings, dict):
        now = mine.get("settings", {})
        wrong = [key for key in sorted(settings.keys() & now.keys()) if settings[key] != now[key]]
        if wrong:
            then = f"{wrong[0]}: {settings[wrong[0]]!r} there, {now[wrong[0]]!r} here"
            raise CheckpointError(
                f"checkpoint {path} belongs to another run, or was made with other settings ({then}); {_remedy(path)}"
            )
    what = {
        "data": "was made with other prompts: the training prompts have changed since; restore them, or start "
        "another run with --out",
        "model": "was made with another model: the files of generator.path have changed since; restore them, or start "
        "another run with --out",
        "run": f"belongs to another run; {_remedy(path)}",
    }
    for name in known:
        if theirs[name] != mine[name]:
            raise CheckpointError(f"checkpoint {path} {what[name]}")
    for name, key in (("data", "prompts"), ("model", "generator.path")):
        if name not in known and name in mine.get("moved", ()):
            raise CheckpointError(f"checkpoint {path} does not state its {key}: give the place it was made with")


def _role_of(name: str) -> str:
    """``learner/role`` of a stored tensor ``learner/role/parameter``."""
    return "/".join(name.split("/", 2)[:2])


def _check_same_model(path: Path, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    mine = {name: tuple(value.shape) for name, value in expected.items()}
    theirs = {name: tuple(value.shape) for name, value in tensors.items()}
    different = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
    if different:
        name = min(different)
        raise CheckpointError(
            f"checkpoint {path} belongs to another model or policy: {len(different)} tensors differ, "
            f"first {name} ({theirs.get(name, 'absent')} there, {mine.get(name, 'absent')} here); "
            "use the config it was made with"
        )


def rng_state() -> dict[str, Any]:
    """The states of the random generators of Python, NumPy, torch and every GPU, as plain values and tensors."""
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


def restore_rng(state: dict[str, Any]) -> None:
    """Set every random generator to the state that :func:`rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
