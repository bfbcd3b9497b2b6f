"""Presets of memory settings by GPU memory, and the packages that memory settings require. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from alignflow.devices import FP8, capabilities
from alignflow.errors import ConfigError, Problem
from alignflow.extras import remedy
from alignflow.kinds import listing, nearest
from generators.settings import Memory

if TYPE_CHECKING:
    from align.config.model import GeneratorConfig
    from rewards.base import RewardSettings


# -- presets ----------------------------------------------------------------------------------------------------------


def _preset(samples: int, terms: int, optimizer: str, **memory: Any) -> dict[str, Any]:
    return {
        "generator": {"dtype": "bfloat16"},
        "rollout": {"chunk": samples, "decode_chunk": samples},
        "train": {"precision": "bf16", "gradient_checkpointing": True, "optimizer": optimizer, "chunk": terms},
        "memory": {"cache_prompts": "memory", **memory},
        "evaluate": {"chunk": samples},
    }


SMALL: dict[str, Any] = {"quantise": "nf4", "vae_tiling": True, "vae_slicing": True, "trajectories": "cpu"}

PRESETS: Mapping[str, dict[str, Any]] = {
    "12gb": _preset(1, 1, "paged_adamw8bit", rewards="cpu", **SMALL),
    "16gb": _preset(2, 1, "paged_adamw8bit", **SMALL),
    "24gb": _preset(4, 2, "adamw8bit", quantise="int8", vae_tiling=False, vae_slicing=True, trajectories="cpu"),
    "48gb": _preset(8, 4, "adamw", quantise="none", vae_tiling=False, vae_slicing=True),
    "80gb": _preset(16, 8, "adamw", quantise="none", vae_tiling=False, vae_slicing=False),
}
"""Card -> settings that a config of a 12-billion network with a LoRA starts from there."""


def preset(name: str, place: str = "") -> dict[str, Any]:
    """Settings of a preset; raises ConfigError, which lists the presets, if there is none of that name."""
    if name in PRESETS:
        return PRESETS[name]
    others = f"there are {listing(PRESETS)}, or a mapping of settings"
    message = f"no such preset{nearest(name, PRESETS, others)}"
    raise ConfigError([Problem("memory", f"{message}, given {name!r}", place)])


# -- rewards ----------------------------------------------------------------------------------------------------------


def placed(
    rewards: Mapping[str, RewardSettings | None], memory: Memory, followed: RewardSettings | None = None
) -> dict[str, RewardSettings | None]:
    """Name -> reward where ``memory.rewards`` puts it; equal rewards stay equal.

    Args:
        followed: the reward whose gradient a recipe or a search follows. It stays on the device of the samples, because
            its forward and backward pass are part of every step.
    """
    if memory.rewards == "device":
        return dict(rewards)
    from rewards.wrappers.placed import Placed

    return {
        name: reward if reward is None or reward == followed else Placed(reward=reward, device="cpu")
        for name, reward in rewards.items()
    }


# -- what does not go together ----------------------------------------------------------------------------------------


def conflicts(
    generator: GeneratorConfig, memory: Memory, optimizer: str = "adamw", precision: str = "no"
) -> list[tuple[str, str]]:
    """(setting, problem) of memory settings that this generator does not support on any installation."""
    found = []
    cpu = "needs a CUDA card, and generator.device is cpu"
    if generator.kind == "generic" and memory.cache_prompts != "none":
        found.append(("memory.cache_prompts", "a pipeline without an adapter runs whole, with its encoders; use none"))
    if memory.compute == "fp8" and memory.quantise != "fp8":
        found.append(("memory.compute", "fp8 needs weights that are stored in fp8; use memory.quantise=fp8, or dtype"))
    if memory.swap_blocks:
        for path, value in (("quantise", memory.quantise), ("compile", memory.compile)):
            if value != "none":
                found.append((f"memory.{path}", f"{value} does not go with memory.swap_blocks; use one of them"))
    if generator.device == "cpu":
        if memory.offload != "none":
            found.append(("memory.offload", f"{memory.offload} {cpu}; use none"))
        found += [(path, f"{value} {cpu}") for path, value, _, card in _needs(memory, optimizer) if card]
    if memory.attention.startswith("flash") and (generator.dtype, precision) == ("float32", "no"):
        found.append(("memory.attention", f"{memory.attention} does not support float32; use generator.dtype=bfloat16"))
    return found


def missing(memory: Memory, optimizer: str = "adamw", *, training: bool = True, device: str = "auto") -> list[Problem]:
    """Settings whose package is not installed, that this machine's cards lack or, if ``training``, without gradient.

    Args:
        device: ``generator.device``.
    """
    found = [
        Problem(path, f"{value} needs the package {package}: {INSTALL[package]}")
        for path, value, package, _ in _needs(memory, optimizer)
        if find_spec(package) is None
    ]
    if training and memory.attention.startswith("sage"):
        remedy = "train with native, xformers or flash"
        found.append(Problem("memory.attention", f"{memory.attention} has no gradient, it only samples; {remedy}"))
    return found + _card_problems(memory, device)


def require(memory: Memory, device: str, optimizer: str = "adamw", *, training: bool = True) -> None:
    """Raise ConfigError, which names every setting that this machine does not support.

    Args:
        optimizer: ``train.optimizer``.
        device: type of the device the run is on, ``cuda``.
        training: whether gradients are needed.
    """
    found = missing(memory, optimizer, training=training, device=device)
    if device != "cuda":
        found += [
            Problem(path, f"{value} needs a CUDA card ({CARDS.get(value, 'any')}), and this run is on {device}")
            for path, value, _, card in _needs(memory, optimizer)
            if card
        ]
    if found:
        raise ConfigError(found)


def _card_problems(memory: Memory, device: str) -> list[Problem]:
    """A problem of fp8 products where this machine has cards, as nvidia-smi says, and none of them has fp8."""
    cards = capabilities() if memory.compute == "fp8" and device != "cpu" else {}
    if not cards or max(cards.values()) >= FP8:
        return []
    said = ", ".join(f"{name} {major}.{minor}" for name, (major, minor) in cards.items())
    needs = f"fp8 products need compute capability {FP8[0]}.{FP8[1]} (Ada, Hopper or newer), and this machine has"
    return [Problem("memory.compute", f"{needs} {said}; use dtype")]


INSTALL = {
    "bitsandbytes": remedy("bitsandbytes"),
    "torchao": remedy("torchao"),
    "xformers": remedy("xformers"),
    "flash_attn": remedy("flash-attn"),
    "flash_attn_interface": "build FlashAttention 3 from its repository",
    "sageattention": remedy("sageattention"),
    "kernels": remedy("kernels"),
}
"""Package -> how to get it."""

CARDS = {
    **dict.fromkeys(("flash", "flash_hub", "sage", "sage_hub"), "Ampere or newer"),
    **dict.fromkeys(("flash3", "flash3_hub"), "Hopper"),
    "flash4_hub": "Hopper or Blackwell",
}
"""Value -> which card."""


def _needs(memory: Memory, optimizer: str) -> list[tuple[str, str, str, bool]]:
    """(setting, value, package, whether it needs a CUDA card) of every setting that needs a package."""
    packages = {
        "xformers": "xformers",
        "flash": "flash_attn",
        "flash3": "flash_attn_interface",
        "sage": "sageattention",
        **dict.fromkeys(("flash_hub", "flash3_hub", "flash4_hub", "sage_hub"), "kernels"),
    }
    found: list[tuple[str, str, str, bool]] = []
    if memory.quantise != "none":
        fp8 = memory.quantise == "fp8"
        found.append(("memory.quantise", memory.quantise, "torchao" if fp8 else "bitsandbytes", not fp8))
    if memory.attention in packages:
        found.append(("memory.attention", memory.attention, packages[memory.attention], True))
    if optimizer != "adamw":
        found.append(("train.optimizer", optimizer, "bitsandbytes", optimizer.startswith("paged")))
    return found
