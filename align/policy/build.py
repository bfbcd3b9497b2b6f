"""Construction of generator, trainable parameters and rewards from settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from align.config.memory import INSTALL, Memory, require
from align.config.model import FullPolicy, GeneratorConfig, LoRAPolicy
from align.policy import held
from align.policy.roles import Roles
from alignflow.errors import ConfigError
from generators.base import Generator, Options
from rewards.base import Reward, RewardSettings

if TYPE_CHECKING:
    from align.config.settings import Config, Train


def hush() -> None:
    """No bars for reading weights from disk, which takes seconds; those of downloads stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def build_generator(
    generator: GeneratorConfig,
    memory: Memory,
    device: torch.device | str,
    *,
    training: bool = False,
    optimizer: str = "adamw",
    kinds: Sequence[str] = ("ode",),
) -> Generator:
    """The generator of a config, loaded onto ``device``.

    Args:
        generator: section ``generator`` of any config.
        memory: section ``memory`` of any config.
        training: whether gradients will be wanted.
        optimizer: ``train.optimizer``, whose package is required before anything is loaded.
        kinds: of the sampling steps that will be taken.

    A scheduler that steps otherwise is said in one line on stderr.

    Raises:
        GeneratorError: it cannot be loaded.
        ConfigError: this machine lacks what ``memory`` or ``train.optimizer`` asks for.
    """
    from align.rollout.solver import remark
    from generators.load import load
    from generators.memory import Memory as Kept

    hush()
    device = torch.device(device)
    require(memory, device.type, optimizer, training=training)
    options = Options(**{field.name: getattr(generator, field.name) for field in fields(Options)})
    kept = {field.name: getattr(memory, field.name) for field in fields(Kept)}
    if device.type == "cpu":
        kept["offload"] = "none"  # the encoders are there already
    elif memory.cache_prompts != "none" and kept["offload"] == "none":
        kept["offload"] = "group"  # so that encoders which are about to go never stand on the card beside the network
    loaded = load(
        generator.kind, generator.path, dtype=generator.dtype, options=options, device=device, memory=Kept(**kept)
    )
    if (line := remark(loaded, kinds)) and int(os.environ.get("RANK", "0")) == 0:
        print(f"note: {line}", file=sys.stderr)
    return loaded


def sampling_kinds(config: Config) -> list[str]:
    """Kinds of the sampling steps that a training run takes, in rollouts and in evaluations."""
    rollout = getattr(config.rollout, "sampler", None)
    return sorted({config.evaluate.sampler.kind, *([rollout.kind] if rollout else [])})


def trainable(policy: LoRAPolicy | FullPolicy, generator: Generator, seed: int) -> list[tuple[str, nn.Parameter]]:
    """The policy's parameters: a LoRA on the backbone, or all of the backbone. The seed is that of a new LoRA."""
    if policy.kind == "lora":
        from align.policy.lora import add_lora, continue_lora

        if policy.init is not None:
            return continue_lora(generator, Path(policy.init).expanduser())
        return add_lora(generator, policy.rank, policy.alpha or policy.rank, policy.targets, seed=seed)
    generator.backbone.requires_grad_(True)
    return list(generator.backbone.named_parameters())


def build_roles(config: Config, generator: Generator) -> Roles:
    """The policy's parameters on the generator, and the other roles that the config needs."""
    from align.policy.lora import lora_off

    parameters = trainable(config.policy, generator, config.seed)
    base = partial(lora_off, generator) if held.reference_is_base(config) else None
    return Roles(parameters, held.copies(config), base)


def build_optimizer(train: Train, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW of torch or, where its states are to be small, of bitsandbytes."""
    settings = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)  # type: ignore[arg-type]
    try:
        from bitsandbytes import optim
    except ImportError as error:
        install = INSTALL["bitsandbytes"]
        raise ConfigError(f"train.optimizer {train.optimizer} needs bitsandbytes ({error}): {install}") from error
    names = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}
    return getattr(optim, names[train.optimizer])(parameters, **settings)


def build_rewards(
    settings: Mapping[str, RewardSettings | None], device: torch.device | str, *, learning: str | None = None
) -> dict[str, Reward]:
    """Name -> ready reward; equal settings are built once, entries without settings are left out.

    Args:
        learning: which may be one that learns while the policy does; none by default.

    Raises:
        RewardError: one cannot be loaded, or learns and may not.
    """
    hush()
    built: list[tuple[RewardSettings, Reward]] = []
    rewards = {}
    for name, wanted in settings.items():
        if wanted is None:
            continue
        ready = next((reward for known, reward in built if known == wanted), None)
        if ready is None:
            ready = wanted.build(device)
            built.append((wanted, ready if name == learning else ready.fixed()))
        rewards[name] = ready
    return rewards
