"""Sharding of the trained network over processes (FSDP2), requested by accelerate's launcher. No torch.

The launcher passes its options in environment variables: ``accelerate launch --use_fsdp --fsdp_version 2`` sets
``ACCELERATE_USE_FSDP=true`` and ``FSDP_VERSION=2``. Any other launcher may set them as well.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from alignflow.errors import Problem

if TYPE_CHECKING:
    from align.config.settings import Config

USE = "ACCELERATE_USE_FSDP"
LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""With this variable transformers gives every process but the first empty weights, of text encoders and rewards too."""


def asked() -> bool:
    """Whether the launch requests sharding."""
    return _set(USE)


def problems(config: Config) -> list[Problem]:
    """Settings that sharding does not support; empty if the launch does not request sharding."""
    if not asked():
        return []
    found = []
    if os.environ.get("FSDP_VERSION", "1") != "2":
        found.append(Problem("", "launched with FSDP 1: use --fsdp_version 2 (FSDP_VERSION=2)"))
    if _set("FSDP_OFFLOAD_PARAMS"):
        found.append(Problem("", "launched with offloaded shards: use --fsdp_offload_params false"))
    if _set("FSDP_ACTIVATION_CHECKPOINTING"):
        found.append(
            Problem("", "launched with activation checkpointing of FSDP: use train.gradient_checkpointing instead")
        )
    if config.memory.quantise != "none":
        kept = f"{config.memory.quantise} weights cannot be sharded (FSDP2): use none, or launch without FSDP"
        found.append(Problem("memory.quantise", kept))
    if getattr(config.rollout, "engine", None) is not None:
        said = "an engine is sent whole weights, and those of a sharded network (FSDP2) are not: leave this out"
        found.append(Problem("rollout.engine", said))
    if config.memory.swap_blocks:
        found.append(Problem("memory.swap_blocks", "blocks of a sharded network (FSDP2) are not swapped: use 0"))
    if config.memory.roles != "device":
        found.append(Problem("memory.roles", "roles of a sharded network (FSDP2) are sharded on the cards: use device"))
    if config.memory.compile != "none":
        found.append(Problem("memory.compile", "sharded networks (FSDP2) are not compiled: use none"))
    if config.train.optimizer != "adamw":
        states = f"{config.train.optimizer} cannot hold sharded states (FSDP2): use adamw, whose states are sharded"
        found.append(Problem("train.optimizer", states))
    if any({"network", "text"} <= set(learns.trains) for learns in config.recipe.learners().values()):
        mixed = "text encoders stay whole beside a sharded network (FSDP2), and one optimizer cannot hold both"
        found.append(Problem("recipe.trains", f"{mixed}: use text, or launch without FSDP"))
    return found


def _set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
