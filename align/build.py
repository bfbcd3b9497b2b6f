"""Settings -> the heavy things: generator, trainable parameters, rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import nn

from generators.base import Generator, Options
from rewards.base import Reward, RewardSettings

if TYPE_CHECKING:
    from align.settings import Config


def hush() -> None:
    """No bars for reading weights from disk, which takes seconds; those of downloads stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def build_generator(config: Config, device: torch.device | str) -> Generator:
    """The generator of a config, loaded onto ``device``; raises GeneratorError."""
    from generators.load import load

    hush()
    settings = config.generator
    options = Options(**{field.name: getattr(settings, field.name) for field in fields(Options)})
    return load(settings.kind, settings.path, dtype=settings.dtype, options=options, device=device)


def trainable(config: Config, generator: Generator) -> list[tuple[str, nn.Parameter]]:
    """The policy's parameters: a fresh LoRA on the backbone, or all of the backbone."""
    policy = config.policy
    if policy.kind == "lora":
        from align.lora import add_lora

        return add_lora(generator, policy.rank, policy.alpha or policy.rank, policy.targets, seed=config.seed)
    generator.backbone.requires_grad_(True)
    return list(generator.backbone.named_parameters())


def build_rewards(settings: Mapping[str, RewardSettings | None], device: torch.device | str) -> dict[str, Reward]:
    """Name -> ready reward; equal settings are built once, entries without settings are left out."""
    hush()
    built: list[tuple[RewardSettings, Reward]] = []
    rewards = {}
    for name, wanted in settings.items():
        if wanted is None:
            continue
        ready = next((reward for known, reward in built if known == wanted), None)
        if ready is None:
            ready = wanted.build(device)
            built.append((wanted, ready))
        rewards[name] = ready
    return rewards
