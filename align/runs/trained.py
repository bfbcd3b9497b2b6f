"""The trained policy of a run on disk, a LoRA, a gate or whole networks: found and loaded into its generator."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow.errors import CheckpointError, RunFolderError
from alignflow.files.policies import GATED, other_than_lora
from alignflow.lazy import lazy
from alignflow.text import first_line
from generators.errors import GeneratorError

if TYPE_CHECKING:
    from align.policy import gated, users
    from align.policy.layers import LoraError
    from align.policy.lora import load_lora
    from align.runs.checkpoint import latest, list_steps
    from generators.base import Generator
    from generators.parts import load_network
else:
    latest = lazy("align.runs.checkpoint:latest")
    list_steps = lazy("align.runs.checkpoint:list_steps")
    gated, users = lazy("align.policy.gated"), lazy("align.policy.users")
    load_lora = lazy("align.policy.lora:load_lora")
    LoraError = lazy("align.policy.layers:LoraError")
    load_network = lazy("generators.parts:load_network")

NETWORK = "transformer"


@dataclass(frozen=True)
class Trained:
    """Location of a policy.

    Args:
        run: its run folder.
        folder: holds its LoRA, its gate, or ``transformer/`` where all weights were trained.
        step: training steps behind it.
        checkpoint: whether it is a checkpoint of a run, not the result of a finished one.
    """

    run: Path
    folder: Path
    step: int
    checkpoint: bool


def find_policy(path: Path) -> Trained:
    """The policy of a run folder, or of one checkpoint in it; a run that is not finished answers with its newest.

    Raises:
        RunFolderError: neither of the two.
        CheckpointError: the run has no checkpoint yet.
    """
    if (path / "manifest.json").is_file():
        return _of_checkpoint(path.resolve().parent.parent, path)
    if not (path / "config.yaml").is_file():
        what = "is neither a run folder nor a checkpoint" if path.exists() else "does not exist"
        raise RunFolderError(f"{path} {what}; name a folder that `alignflow train` wrote")

    finished = path / "lora" if (path / "lora").is_dir() else path if (path / NETWORK).is_dir() else None
    steps, newest = list_steps(path / "checkpoints"), latest(path / "checkpoints")
    done = _summary(path).get("steps", 0)
    if finished is not None and (not steps or steps[-1] <= done):
        return Trained(path, finished, done, checkpoint=False)
    if newest is None:
        raise CheckpointError(f"{path} has nothing trained yet: no checkpoint, no lora/, no {NETWORK}/")
    return _of_checkpoint(path, newest)


def _of_checkpoint(run: Path, path: Path) -> Trained:
    if not (run / "config.yaml").is_file():
        raise RunFolderError(f"{path} is not in a run folder: no {run / 'config.yaml'}")
    return Trained(run, path, int(path.resolve().name.removeprefix("step-")), checkpoint=True)


def _summary(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def load_policy(generator: Generator, path: Path) -> None:
    """Put a trained policy onto its generator; nothing is trained then.

    Args:
        path: a LoRA's file or folder, that of a gate or of attention to users, or a folder with ``transformer/`` (and
            ``transformer_2/``) as diffusers saves it.

    Raises:
        LoraError: nothing there, damaged, or made for another model.
    """
    if other := other_than_lora(path):
        (gated.load_gated if other.name == GATED else users.load_users)(generator, other)
        return
    if not (path / NETWORK).is_dir():
        load_lora(generator, path)
        return
    for name, network in generator.backbones().items():
        _load_network(network, path / name)


def _load_network(network: Any, folder: Path) -> None:
    try:
        trained = load_network(folder, folder.name, type(network), network.dtype)
        network.load_state_dict(trained.state_dict())
    except (GeneratorError, RuntimeError) as error:
        raise LoraError(f"{folder} does not load as this {type(network).__name__}: {first_line(error)}") from error
    network.requires_grad_(False)
