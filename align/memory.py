"""What a run keeps on a card: the settings, presets by card size, what they need installed. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field

from align.errors import ConfigError, Problem, TrainingError
from align.variants import listing, nearest
from alignflow.extras import remedy
from alignflow.strict import Strict

if TYPE_CHECKING:
    from align.settings import Config


class Memory(Strict):
    """What fits a card: see docs/memory.md. The name of a preset, such as ``24gb``, may stand here instead."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_prompts: Literal["none", "memory", "disk"] = Field(
        "none", description="encode every prompt once, keep it on the CPU or in the run folder, drop the text encoders"
    )
    offload: Literal["none", "model", "group"] = Field(
        "none", description="text encoders wait on the CPU and come to the card whole, or layer by layer"
    )
    quantise: Literal["none", "nf4", "int8", "fp8"] = Field(
        "none", description="how the frozen base under a LoRA is stored"
    )
    attention: Literal["auto", "native", "xformers", "flash", "flash3", "sage"] = Field(
        "auto", description="attention backend of the trained network; sage only draws: it has no gradient"
    )
    compile: Literal["none", "blocks", "full"] = Field("none", description="torch.compile of the trained network")
    vae_tiling: bool = Field(False, description="code large pictures tile by tile; blended, so not equal bit for bit")
    vae_slicing: bool = Field(False, description="code pictures one by one")


# -- presets ----------------------------------------------------------------------------------------------------------


def _preset(samples: int, terms: int, optimizer: str, **memory: Any) -> dict[str, Any]:
    return {
        "generator": {"dtype": "bfloat16"},
        "rollout": {"chunk": samples, "decode_chunk": samples},
        "train": {"precision": "bf16", "gradient_checkpointing": True, "optimizer": optimizer, "micro_batch": terms},
        "memory": {"cache_prompts": "memory", **memory},
        "evaluate": {"chunk": samples},
    }


PRESETS: Mapping[str, dict[str, Any]] = {
    "12gb": _preset(1, 1, "paged_adamw8bit", quantise="nf4", vae_tiling=True, vae_slicing=True),
    "16gb": _preset(2, 1, "paged_adamw8bit", quantise="nf4", vae_tiling=True, vae_slicing=True),
    "24gb": _preset(4, 2, "adamw8bit", quantise="int8", vae_tiling=False, vae_slicing=True),
    "48gb": _preset(8, 4, "adamw", quantise="none", vae_tiling=False, vae_slicing=True),
    "80gb": _preset(16, 8, "adamw", quantise="none", vae_tiling=False, vae_slicing=False),
}
"""Card -> settings that a config of a 12-billion network with a LoRA starts from there."""


def preset(name: str, place: str = "") -> dict[str, Any]:
    """Settings of a preset; raises ConfigError naming those there are."""
    if name in PRESETS:
        return PRESETS[name]
    message = f"no such preset{nearest(name, PRESETS)}; there are {listing(PRESETS)}, or a mapping of settings"
    raise ConfigError([Problem("memory", f"{message}, given {name!r}", place)])


# -- what does not go together ----------------------------------------------------------------------------------------


def problems(config: Config) -> list[tuple[str, str]]:
    """(setting, what is wrong with it) of a config, whatever is installed."""
    memory, train, found = config.memory, config.train, []
    cpu = "needs a CUDA card, and generator.device is cpu"
    if config.policy.kind == "full" and memory.quantise != "none":
        found.append(("memory.quantise", f"{memory.quantise} weights cannot be trained; use policy.kind=lora, or none"))
    if config.generator.kind == "generic" and memory.cache_prompts != "none":
        found.append(("memory.cache_prompts", "a pipeline without an adapter runs whole, with its encoders; use none"))
    if config.generator.device == "cpu":
        if memory.offload != "none":
            found.append(("memory.offload", f"{memory.offload} {cpu}; use none"))
        found += [(path, f"{value} {cpu}") for path, value, _, card in _needs(config) if card]
    if memory.attention.startswith("flash") and (config.generator.dtype, train.precision) == ("float32", "no"):
        found.append(("memory.attention", f"{memory.attention} has no float32; use generator.dtype=bfloat16"))
    return found


def missing(config: Config) -> list[Problem]:
    """What the settings need and is not installed, or cannot train."""
    found = [
        Problem(path, f"{value} needs the package {package}: {INSTALL[package]}")
        for path, value, package, _ in _needs(config)
        if find_spec(package) is None
    ]
    if config.memory.attention == "sage":
        found.append(
            Problem("memory.attention", "sage has no gradient, it only draws; train with native, xformers, flash")
        )
    return found


def require(config: Config, device: str, *, training: bool = True) -> None:
    """Raise ConfigError naming every setting that this machine cannot honour.

    Args:
        device: type of the device the run is on, ``cuda``.
        training: whether gradients are wanted.
    """
    found = [problem for problem in missing(config) if training or not problem.message.startswith("sage has")]
    if device != "cuda":
        found += [
            Problem(path, f"{value} needs a CUDA card ({CARDS.get(value, 'any')}), and this run is on {device}")
            for path, value, _, card in _needs(config)
            if card
        ]
    if found:
        raise ConfigError(found, config.name)


INSTALL = {
    "bitsandbytes": remedy("bitsandbytes"),
    "torchao": remedy("torchao"),
    "xformers": remedy("xformers"),
    "flash_attn": remedy("flash-attn"),
    "flash_attn_interface": "build FlashAttention 3 from its repository",
    "sageattention": remedy("sageattention"),
}
"""Package -> how to get it."""

CARDS = {"flash": "Ampere or newer", "flash3": "Hopper", "sage": "Ampere or newer"}
"""Value -> which card."""


def _needs(config: Config) -> list[tuple[str, str, str, bool]]:
    """(setting, value, package, whether it needs a CUDA card) of every setting that asks for one."""
    memory, optimizer = config.memory, config.train.optimizer
    packages = {
        "xformers": "xformers",
        "flash": "flash_attn",
        "flash3": "flash_attn_interface",
        "sage": "sageattention",
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


# -- out of memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remedy:
    """One setting to change when memory runs out; a value of None is for the user to choose."""

    path: str
    value: Any
    price: str

    @property
    def change(self) -> str:
        """As it stands on a command line."""
        return self.path if self.value is None else f"{self.path}={'true' if self.value is True else self.value}"

    def __str__(self) -> str:
        return f"{self.change}  ({self.price})"


def remedies(config: Config) -> list[Remedy]:
    """What to change when memory runs out, cheapest first, without what is on already."""
    memory, train, rollout = config.memory, config.train, config.rollout
    lora, online = config.policy.kind == "lora", rollout.kind == "online"
    chunk, decoded = getattr(rollout, "chunk", 1), getattr(rollout, "decode_chunk", 1)
    on_card, size = config.generator.device != "cpu", config.generator.size
    smaller = None if size is None else [max(64, side * 3 // 4 // 64 * 64) for side in size]
    rank = getattr(config.policy, "rank", 1)
    steps = [
        (train.micro_batch > 1, "train.micro_batch", train.micro_batch // 2, "the same gradient in more passes"),
        (not train.gradient_checkpointing, "train.gradient_checkpointing", True, "a third more time"),
        (online and chunk > 1, "rollout.chunk", chunk // 2, "the same samples, fewer at a time"),
        (memory.cache_prompts == "none", "memory.cache_prompts", "memory", "text encoders leave once all is encoded"),
        (online and decoded > 1, "rollout.decode_chunk", decoded // 2, "the same pictures, fewer at a time"),
        (config.evaluate.chunk > 1, "evaluate.chunk", config.evaluate.chunk // 2, "the same samples, fewer at a time"),
        (config.generator.dtype == "float32", "generator.dtype", "bfloat16", "half of every weight"),
        (lora and on_card and memory.quantise == "none", "memory.quantise", "nf4", "a quarter of the frozen base"),
        (on_card and train.optimizer == "adamw", "train.optimizer", "paged_adamw8bit", "an eighth of its states"),
        (not memory.vae_tiling, "memory.vae_tiling", True, "large pictures tile by tile"),
        (not lora, "policy.kind", "lora", "roles, gradients and states of the base go"),
        (online and rollout.group > 3, "rollout.group", rollout.group // 2, "fewer samples to keep"),
        (lora and rank > 4, "policy.rank", rank // 2, "a smaller LoRA"),
        (True, "generator.size", smaller, "smaller pictures, or fewer generator.frames"),
        (True, "generator.path", None, "a smaller model, or a larger card"),
        (True, "generator.device", None, "another card: does something else hold memory of this one?"),
    ]
    return [Remedy(path, value, price) for wanted, path, value, price in steps if wanted]


def out_of_memory(error: BaseException) -> str:
    """What was said if ``error`` means that memory ran out, of a card or of the machine; else ''."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    said = isinstance(error, RuntimeError) and any(words in lines[0] for words in RAN_OUT)
    return lines[0] if named or said else ""


RAN_OUT = ("out of memory", "not enough memory", "can't allocate memory")
"""How torch's allocators say so in a plain RuntimeError."""


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Turn running out of memory into the three settings to try first.

    Raises:
        TrainingError: memory ran out inside the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = out_of_memory(error)
        if not reason:
            raise
        tries = "".join(f"\n  {remedy}" for remedy in remedies(config)[:3])
        raise TrainingError(
            f"out of memory: {reason}\ntry first, cheapest first:{tries}\n"
            f"{config.run_dir} keeps its last checkpoint: --resume goes on from it, with these too (generator, policy, "
            "memory.quantise and train.optimizer need a new run); alignflow check --card 24gb tells what fits"
        ) from error
