"""The trained part of a policy that is not all weights, copied and written to its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from align.policy import gated, users
from align.policy.lora import ADAPTER, loras_of, write_lora
from generators.base import Generator

if TYPE_CHECKING:
    from align.config.settings import Config


def writer(config: Config, generator: Generator) -> Callable[[Path], object]:
    """Copies the trained part as it is now, of a policy that is not all weights; the result writes it into a folder.

    Where weights are sharded every process must call it, and one of them the result.
    """
    if config.policy.kind == "gate":
        tensors, names = gated.gated_tensors(generator), gated.names(generator)
        return lambda folder: gated.save_gated(folder, tensors, names)
    if config.policy.kind == "users":
        assert isinstance(generator.users, users.Users)
        tensors, names = users.user_tensors(generator), list(generator.users.known)
        return lambda folder: users.save_users(folder, tensors, names)
    loras = loras_of(generator, ADAPTER)
    return lambda folder: write_lora(loras, folder)
