"""The part of an engine that every kind of HTTP server shares: the servers, and the folder of the policies' LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from align.rollout.lora_folder import LoraFolder, pack
from align.rollout.servers import Servers, greet
from generators.base import Generator

if TYPE_CHECKING:
    from align.config.settings import Config


class OnServers:
    """An engine whose servers read each policy's LoRA from a folder; one sample a request.

    Raises:
        TrainingError: a server does not answer, or has another protocol.
    """

    chunk: int | None = 1

    def __init__(self, settings: Any, config: Config, generator: Generator, folder: type[LoraFolder]) -> None:
        self.settings, self.generator, self.sampler = settings, generator, config.rollout.sampler  # type: ignore[union-attr]
        self.servers = Servers(settings)
        self.parallel = len(self.servers)
        self.folder = folder(settings.folder, settings.folder_there)
        greet(config)

    def pack(self, trained: Mapping[str, Tensor]) -> bytes:
        """The LoRA in place in diffusers' names, as a safetensors file."""
        return pack(self.generator)

    def push(self, weights: bytes, policy: str) -> None:
        """Write the LoRA into the folder; a server reads it before the policy's first sample."""
        self.folder.write(weights, policy)
