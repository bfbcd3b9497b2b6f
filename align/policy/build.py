"""Construction of generator, trainable parameters and rewards from settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from align.config.memory import INSTALL, placed, require
from align.config.model import GeneratorConfig
from align.policy import held
from align.policy.added import added_off, added_parameters
from align.policy.gated import add_gates, read_experts
from align.policy.lora import ADAPTER, add_lora, continue_lora, lora_parameters
from align.policy.roles import Roles
from align.policy.switching import lora_off, lora_only
from align.policy.users import Users, add_users, read_embeddings
from alignflow.errors import ConfigError, Problem
from alignflow.lazy import lazy
from generators.base import Generator
from generators.settings import Memory
from rewards.base import Reward, RewardSettings

if TYPE_CHECKING:
    from align.config.sections import Train
    from align.config.settings import Config
    from align.policy.solver import remark
    from generators.load import load
else:
    remark = lazy("align.policy.solver:remark")
    load = lazy("generators.load:load")


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
        training: whether gradients will be computed.
        optimizer: ``train.optimizer``, whose package is required before anything is loaded.
        kinds: of the sampling steps that will be taken.

    If the pipeline's scheduler takes other steps than ours, a line on stderr says so.

    Raises:
        GeneratorError: it cannot be loaded.
        ConfigError: this machine lacks something that ``memory`` or ``train.optimizer`` needs.
    """
    hush()
    device = torch.device(device)
    require(memory, device.type, optimizer, training=training)
    if device.type == "cpu":
        memory = memory.model_copy(update={"offload": "none"})  # the encoders are there already
    elif memory.cache_prompts != "none" and memory.offload == "none":
        # encoders that are freed after encoding must never be on the card beside the network
        memory = memory.model_copy(update={"offload": "group"})
    loaded = load(
        generator.kind, generator.path, dtype=generator.dtype, options=generator, device=device, memory=memory
    )
    if (line := remark(loaded, kinds)) and int(os.environ.get("RANK", "0")) == 0:
        print(f"note: {line}", file=sys.stderr)
    return loaded


def sampling_kinds(config: Config) -> list[str]:
    """Kinds of the sampling steps that a training run takes, in rollouts and in evaluations."""
    rollout = getattr(config.rollout, "sampler", None)
    return sorted({config.evaluate.sampler.kind, *([rollout.kind] if rollout else [])})


def add_trained(config: Config, generator: Generator) -> None:
    """Make the parameters of every learner of the recipe: fresh LoRAs, a continued one, added modules, or the network.

    The network then computes as the policy.

    Raises:
        ConfigError: the recipe has several learners, and the policy is not a LoRA: they cannot share it.
        LoraError: a LoRA that is loaded is not there or does not fit.
    """
    policy, learners = config.policy, config.recipe.learners()
    if policy.kind != "lora":
        if others := [name for name in learners if name != "policy"]:
            raise ConfigError(
                [Problem("policy.kind", f"{config.recipe.kind} trains a {others[0]} on the same network: use lora")],
                config.name,
            )
        generator.backbone.requires_grad_(policy.kind == "full")
        if policy.kind == "gate":
            files = {name: expert.lora for name, expert in policy.experts.items()}
            add_gates(generator, read_experts(generator, files), policy.features)
        elif policy.kind == "users":
            add_users(generator, Users(read_embeddings(policy.embeddings), policy.user), config.seed)
        return
    for name, learns in learners.items():
        start = policy.init if name == "policy" else learns.init
        if start is not None:
            continue_lora(generator, Path(start).expanduser(), adapter_of(name), learns.trains)
        else:
            add_lora(
                generator, policy.rank, policy.alpha or policy.rank, policy.targets, seed=config.seed,
                name=adapter_of(name), parts=learns.trains,
            )  # fmt: skip
    if len(learners) > 1:
        for network in generator.backbones().values():
            network.set_adapter(ADAPTER)  # type: ignore[operator]
        for name, learns in learners.items():
            for _, value in parameters_of(config, generator, name):
                value.requires_grad_(learns.updates != 0)


def adapter_of(learner: str) -> str:
    """Name of a learner's LoRA."""
    return ADAPTER if learner == "policy" else learner


def parameters_of(config: Config, generator: Generator, learner: str = "policy") -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of a learner as the network has them now, so also after the accelerator prepared it."""
    if config.policy.kind == "lora":
        return lora_parameters(generator, adapter_of(learner), config.recipe.learners()[learner].trains)
    if config.policy.kind != "full":
        return added_parameters(generator)
    return list(generator.backbone.named_parameters())


def trainable(config: Config, generator: Generator) -> list[tuple[str, nn.Parameter]]:
    """The policy's parameters: a LoRA, what is added to the blocks of the backbone, or all of the backbone."""
    add_trained(config, generator)
    return parameters_of(config, generator)


def build_roles(config: Config, generator: Generator) -> dict[str, Roles]:
    """Learner -> its roles, after :func:`add_trained`. The policy has those that the config needs, others none."""
    off = lora_off if config.policy.kind == "lora" else added_off
    base = partial(off, generator) if held.reference_is_base(config) else None
    own = (held.copies(config), base, held.starts_at_base(config), config.memory.roles == "cpu")
    return {
        name: Roles(parameters_of(config, generator, name), *(own if name == "policy" else ()))
        for name in config.recipe.learners()
    }


def contexts(config: Config, generator: Generator) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Learner -> makes the context in which the network computes as that learner; empty if there is only one."""
    learners = config.recipe.learners()
    if len(learners) < 2:
        return {}
    return {name: partial(lora_only, generator, adapter_of(name)) for name in learners}


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
    settings: Mapping[str, RewardSettings | None],
    device: torch.device | str,
    memory: Memory | None = None,
    *,
    learning: str | None = None,
    followed: RewardSettings | None = None,
) -> dict[str, Reward]:
    """Name -> ready reward; equal settings are built once, entries without settings are left out.

    Args:
        memory: ``memory.rewards`` places them; all are on ``device`` by default.
        learning: which may be one that learns while the policy does; none by default.
        followed: the one whose gradient is followed, which stays on ``device``.

    Raises:
        RewardError: one cannot be loaded, or learns and may not.
    """
    hush()
    built: list[tuple[RewardSettings, Reward]] = []
    rewards = {}
    for name, wanted in placed(settings, memory or Memory(), followed).items():
        if wanted is None:
            continue
        ready = next((reward for known, reward in built if known == wanted), None)
        if ready is None:
            ready = wanted.build(device)
            built.append((wanted, ready if name == learning else ready.fixed()))
        rewards[name] = ready
    return rewards
