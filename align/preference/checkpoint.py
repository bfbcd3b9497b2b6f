"""Checkpoint of a reward in training: trained weights, optimizer and random numbers in one safetensors file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.data.files import new_folder, without_nan, writing
from align.runs.identity import changes, refused
from align.runs.owned import REWARD, mark
from alignflow.errors import CheckpointError, RunFolderError
from alignflow.files import tensor_files
from alignflow.text import first_line

FREE = ("name", "out", "device", "fit.log_every", "fit.checkpoint")
"""Settings that may change when a training is resumed."""
FOLDER, FILE = "checkpoint", "state.safetensors"


@dataclass
class Learned:
    """Tensors that a training run changes, and its measurements so far.

    Args:
        weights: trained parameters and buffers by name.
    """

    weights: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator
    step: int = 0
    before: Any = None
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, the optimizer's moments, and the states of torch's random generators."""
        found = {f"weight.{name}": value for name, value in self.weights.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
        found["random.cpu"] = torch.get_rng_state()
        if (device := self.device).type == "cuda":
            found["random.cuda"] = torch.cuda.get_rng_state(device)
        return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(iter(self.weights.values())).device

    def take(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Continue from what :meth:`tensors` and the file's notes hold."""
        with torch.no_grad():
            for name, value in self.weights.items():
                value.copy_(tensors[f"weight.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                state.setdefault(int(number), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.rng.bit_generator.state = about["rng"]
        self.step, self.before, self.metrics = about["step"], about["before"], about["metrics"]


class Checkpoint:
    """The checkpoint in a reward's folder; it is removed when the reward is finished.

    Args:
        folder: of the reward.
        settings: resolved settings of the run.
        data: digest of its table.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], data: str) -> None:
        self.folder, self.settings, self.data = folder, settings, data
        self.file = folder / FOLDER / FILE

    def save(self, learned: Learned) -> None:
        """Write the state in one step."""
        about = {
            "step": learned.step, "before": learned.before, "metrics": learned.metrics, "data": self.data,
            "rng": learned.rng.bit_generator.state, "settings": self.settings,
        }  # fmt: skip
        if not self.folder.exists():
            with new_folder(self.folder) as staging:
                mark(staging, REWARD)
        with writing(self.file):
            self.file.parent.mkdir(exist_ok=True)
            tensor_files.save(self.file, learned.tensors(), {"about": json.dumps(without_nan(about))})

    def resume(self, learned: Learned) -> bool:
        """Continue from the file; False if there is none.

        Raises:
            CheckpointError: it is damaged, or of another model.
            RunFolderError: it was made with other settings or another table.
        """
        if not self.file.is_file():
            return False
        try:
            from safetensors.torch import load_file

            about = json.loads(tensor_files.header(self.file)[1]["about"])
            tensors = load_file(self.file)
        except Exception as error:  # the reader's error depends on the damage
            raise CheckpointError(f"{self.file} cannot be read: {first_line(error)}; start with --overwrite") from error
        if wrong := refused(changes(about["settings"], self.settings), FREE):
            raise RunFolderError(
                f"{self.folder} was started with other settings, so it cannot be continued exactly:\n  "
                + "\n  ".join(wrong)
            )
        if about["data"] != self.data:
            raise RunFolderError(
                f"{self.folder} was started with other content of data.train; start again with --overwrite"
            )
        try:
            learned.take(tensors, about)
        except Exception as error:  # a missing key, another shape
            raise CheckpointError(
                f"{self.file} does not fit this model: {first_line(error)}; start with --overwrite"
            ) from error
        return True

    def forget(self) -> None:
        """Remove the checkpoint, for a training that starts anew."""
        shutil.rmtree(self.file.parent, ignore_errors=True)
