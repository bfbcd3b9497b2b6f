"""The folder through which engines get policies: a LoRA in diffusers' or peft's layout, named by the digest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from align.data.files import writing
from align.policy.build import adapter_of
from align.policy.layers import PREFIX
from align.policy.lora import files_of, loras_of
from alignflow.files import disk, tensor_files
from alignflow.files.lora_files import file_of
from generators.base import Generator

KEPT = 2
"""Policies whose files stay: the newest, and the one before, which another process may still be giving to a server."""
ABOUT = {"format": "pt"}  # ``alpha / rank`` is in B, so that no header is needed


def pack(generator: Generator) -> bytes:
    """The policy's LoRA by the role in place: tensors of diffusers' files, ``FILE/NAME``, as one safetensors file."""
    files = files_of(loras_of(generator, adapter_of("policy")))
    return save({f"{file}/{name}": value for file, (tensors, _) in files.items() for name, value in tensors.items()})


class LoraFolder:
    """Files of the newest policies.

    Args:
        here: the folder on this machine; ``there`` is its path on the servers.
    """

    def __init__(self, here: str, there: str | None) -> None:
        self.here = Path(here).expanduser().absolute()
        self.there = PurePosixPath(there or self.here)
        self.written: list[str] = []
        self.networks: list[str] = []
        """Networks that the newest policy has a file for."""
        self.changes = False
        """Whether the newest policy changes any weight; a new LoRA does not."""

    def write(self, weights: bytes, policy: str) -> None:
        """Write the files of weights that :func:`pack` made; raises RunFolderError where they cannot be written."""
        files: dict[str, dict[str, Tensor]] = {}
        for name, value in load(weights).items():
            file, _, key = name.partition("/")
            files.setdefault(file, {})[key] = value
        self.networks = [name for name in ("transformer", "transformer_2") if file_of(name) in files]
        self.changes = any(bool(value.any()) for name, value in load(weights).items() if ".lora_B." in name)
        folder = self.here / policy
        for file, tensors in files.items():
            with writing(folder / file):
                folder.mkdir(parents=True, exist_ok=True)
                self.save(folder, file, tensors)
        self.written = [*(one for one in self.written if one != policy), policy]
        for old in self.written[:-KEPT]:
            shutil.rmtree(self.here / old, ignore_errors=True)
        self.written = self.written[-KEPT:]

    def save(self, folder: Path, file: str, tensors: dict[str, Tensor]) -> None:
        """Write one network's tensors, which have diffusers' names."""
        tensor_files.save(folder / file, tensors, ABOUT)

    def paths(self, policy: str) -> dict[str, str]:
        """Network -> path of its file on the servers."""
        return {name: str(self.there / policy / file_of(name)) for name in self.networks}

    def policy_of(self, paths: Mapping[str, Any]) -> str:
        """Digest of the policy whose files stand at ``paths`` (network -> path); empty where they are none of ours.

        Args:
            paths: what a server says it uses, one for each network.
        """
        found = {PurePosixPath(str(paths.get(name))) for name in self.networks}
        policies = {path.parent.name for path in found if path.parent.parent == self.there}
        return policies.pop() if len(policies) == 1 and len(found) == len(self.networks) else ""


class PeftFolder(LoraFolder):
    """The same in peft's layout, ``adapter_config.json`` beside ``adapter_model.safetensors``, for one network."""

    def save(self, folder: Path, file: str, tensors: dict[str, Tensor]) -> None:
        """Write the two files of the network."""
        renamed = {f"base_model.model.{name.removeprefix(PREFIX)}": value for name, value in tensors.items()}
        tensor_files.save(folder / "adapter_model.safetensors", renamed, ABOUT)
        ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in tensors.items() if "lora_A" in name}
        most = max(ranks.values())
        about = {
            "peft_type": "LORA", "r": most, "lora_alpha": most, "bias": "none",
            "target_modules": sorted(name.removeprefix(PREFIX) for name in ranks),
        }  # fmt: skip
        disk.write_bytes(folder / "adapter_config.json", json.dumps(about).encode())

    def paths(self, policy: str) -> dict[str, str]:
        """Network -> its folder on the servers."""
        return dict.fromkeys(self.networks, str(self.there / policy))
