"""The folder through which engines get the policy: a LoRA in diffusers' layout for each, named by its digest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import load, save

from align.data.files import writing
from align.policy.build import adapter_of
from align.policy.lora import files_of, loras_of
from alignflow.files import tensor_files
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
        files: dict[str, dict[str, Any]] = {}
        for name, value in load(weights).items():
            file, _, key = name.partition("/")
            files.setdefault(file, {})[key] = value
        self.networks = [name for name in ("transformer", "transformer_2") if file_of(name) in files]
        self.changes = any(bool(value.any()) for name, value in load(weights).items() if ".lora_B." in name)
        folder = self.here / policy
        for file, tensors in files.items():
            with writing(folder / file):
                folder.mkdir(parents=True, exist_ok=True)
                tensor_files.save(folder / file, tensors, ABOUT)
        self.written = [*(one for one in self.written if one != policy), policy]
        for old in self.written[:-KEPT]:
            shutil.rmtree(self.here / old, ignore_errors=True)
        self.written = self.written[-KEPT:]

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
