"""Remedies for out-of-memory errors: the cause, and the settings of this config that reduce it. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.checking.reward_sizes import reward_bytes
from align.checking.sizes import terms_per_update
from align.config.memory import placed
from align.config.needs import followed
from align.runs.identity import FREE_ON_RESUME, MEMORY_ALONE
from align.runs.phases import phase_of
from alignflow.errors import TrainingError
from generators.settings import Memory

if TYPE_CHECKING:
    from align.config.settings import Config

RAN_OUT = ("out of memory", "not enough memory", "can't allocate memory")
"""Messages of torch's allocators in a plain RuntimeError."""
TILE = 256
"""Side in pixels above which a VAE can work tile by tile."""
DOING = {
    "load": "loading the model",
    "rollout": "sampling",
    "decode": "decoding samples",
    "reward": "scoring samples",
    "update": "learning",
    "evaluate": "evaluating",
}
"""Phase of a run -> its activity, for messages."""
ALWAYS = frozenset(DOING)


@dataclass(frozen=True)
class Remedy:
    """One setting to change when memory runs out.

    Args:
        value: new value; None = the user has to choose it.
        price: cost of the change, in words.
        phases: phases in which it lowers the memory.
    """

    path: str
    value: Any
    price: str
    phases: frozenset[str] = ALWAYS

    @property
    def change(self) -> str:
        """The override, as on a command line."""
        return self.path if self.value is None else f"{self.path}={'true' if self.value is True else self.value}"

    def __str__(self) -> str:
        return f"{self.change}  ({self.price})"


def processes() -> int:
    """Number of processes of the run, set by the launcher."""
    value = os.environ.get("WORLD_SIZE", "1")
    return int(value) if value.isdigit() and int(value) else 1


def remedies(config: Config, phase: str | None = None) -> list[Remedy]:
    """Settings to change when memory runs out, cheapest first; those already in use or without effect are left out.

    Args:
        phase: phase of the run, a key of :data:`DOING`; None if unknown.
    """
    found = [*_at_a_time(config), *_stored(config), *_smaller(config)]
    return [remedy for remedy in found if phase is None or phase in remedy.phases]


def _at_a_time(config: Config) -> list[Remedy]:
    """Remedies that process fewer things at a time and do not change the result."""
    memory, train, rollout = config.memory, config.train, config.rollout
    online, world = rollout.kind == "online", max(1, processes() // config.parallel.context)
    samples = math.ceil(rollout.prompts * rollout.group / world)
    terms = max(terms_per_update(config, world).values())
    drawn = min(getattr(rollout, "chunk", 1), samples)
    decoded = min(getattr(rollout, "decode_chunk", 1), drawn)
    judged = min(config.evaluate.chunk, math.ceil(config.evaluate.prompts / world)) if config.prompts.heldout else 1
    scored, text = getattr(config.reward, "chunk", None), "text_gradient" in config.recipe.required
    learning, tiled = frozenset({"update"}), config.generator.size is None or max(config.generator.size) > TILE
    steps = [
        (min(train.chunk, terms), "train.chunk", "the same gradient in more passes", learning),
        (not train.gradient_checkpointing, "train.gradient_checkpointing", "a third more time", learning),
        (drawn if online else 1, "rollout.chunk", "the same samples, fewer at a time", frozenset({"rollout"})),
        (
            memory.cache_prompts == "none" and config.generator.kind != "generic" and not text,
            "memory.cache_prompts", "text encoders are freed once all prompts are encoded", ALWAYS - {"load"},
        ),
        (decoded if online else 1, "rollout.decode_chunk", "the same images, fewer at a time", frozenset({"decode"})),
        (judged, "evaluate.chunk", "the same samples, fewer at a time", frozenset({"evaluate"})),
        (
            scored if isinstance(scored, int) else 1,
            "reward.chunk", "the same scores, fewer at a time", frozenset({"reward"}),
        ),
        (
            not memory.vae_tiling and tiled,
            "memory.vae_tiling", "large images tile by tile", frozenset({"decode", "evaluate"}),
        ),
    ]  # fmt: skip
    found = []
    for now, path, price, phases in steps:
        if now is True:
            value: Any = "memory" if path.endswith("cache_prompts") else True
            found.append(Remedy(path, value, price, phases))
        elif now > 1:
            found.append(Remedy(path, now // 2, price, phases))
    return found


def _stored(config: Config) -> list[Remedy]:
    """Remedies that change how weights and states are stored."""
    frozen, on_card = config.policy.kind != "full", config.generator.device != "cpu"
    steps = [
        (config.generator.dtype == "float32", "generator.dtype", "bfloat16", "half of every weight", ALWAYS),
        (on_card and _movable(config), "memory.rewards", "cpu", "scoring takes longer", ALWAYS),
        (
            frozen and on_card and config.memory.quantise == "none",
            "memory.quantise", "nf4", "a quarter of the frozen base", ALWAYS,
        ),
        (
            on_card and config.train.optimizer == "adamw",
            "train.optimizer", "paged_adamw8bit", "an eighth of its states", ALWAYS - {"load"},
        ),
        (not frozen, "policy.kind", "lora", "no roles, gradients and states of the base", ALWAYS),
    ]  # fmt: skip
    return [Remedy(path, value, price, phases) for wanted, path, value, price, phases in steps if wanted]


def _movable(config: Config) -> bool:
    """Whether networks of rewards are on the card that ``memory.rewards`` would put on the CPU."""
    named, cpu = {"reward": config.reward, **config.evaluate.rewards}, Memory(rewards="cpu")
    here, there = (placed(named, memory, followed(config)) for memory in (config.memory, cpu))
    return reward_bytes([*there.values()])[0] < reward_bytes([*here.values()])[0]


def _smaller(config: Config) -> list[Remedy]:
    """Remedies that change the result."""
    rollout, rank, size = config.rollout, getattr(config.policy, "rank", 1), config.generator.size
    on_card, drawing = config.generator.device != "cpu", ALWAYS - {"load"}
    smaller = None if size is None else [min(side, max(64, side * 3 // 4 // 64 * 64)) for side in size]
    shrinks = size is None or smaller != list(size)
    fewer = ", or fewer generator.frames" if (config.generator.frames or 1) > 1 else ""
    another = "another card, if another program uses this one"
    steps = [
        (
            rollout.kind == "online" and rollout.group > 3,
            "rollout.group", rollout.group // 2, "fewer samples to keep", drawing - {"evaluate"},
        ),
        (rank > 4, "policy.rank", rank // 2, "a smaller LoRA", ALWAYS),
        (shrinks, "generator.size", smaller, f"smaller images{fewer}", drawing),
        (True, "generator.path", None, "a smaller model, or a larger card" if on_card else "a smaller model", ALWAYS),
        (on_card, "generator.device", None, another, ALWAYS),
    ]  # fmt: skip
    return [Remedy(path, value, price, phases) for wanted, path, value, price, phases in steps if wanted]


def out_of_memory(error: BaseException) -> str:
    """First line of ``error`` if a card or the machine ran out of memory; else ''."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    said = isinstance(error, RuntimeError) and any(words in lines[0] for words in RAN_OUT)
    return lines[0] if named or said else ""


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Turn an out-of-memory error into a message with the three settings to try first.

    Raises:
        TrainingError: memory ran out inside the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = out_of_memory(error)
        if not reason:
            raise
        phase = phase_of(error)
        tried = remedies(config, phase)[:3]
        where = f" while {DOING[phase]}" if phase in DOING else ""
        tries = "".join(f"\n  {remedy}" for remedy in tried)
        fits = "; alignflow check --card 24gb shows what fits a card" if config.generator.device != "cpu" else ""
        raise TrainingError(
            f"out of memory{where}: {reason}\ntry first, cheapest first:{tries}\n{_afterwards(config, tried)}{fits}"
        ) from error


def _afterwards(config: Config, tried: list[Remedy]) -> str:
    """State of the run, and the remedies with which it can be resumed."""
    steps = sorted(path.name for path in config.run_dir.glob("checkpoints/step-*"))
    if not steps:
        return f"{config.run_dir} has no checkpoint yet: start it again with --overwrite"
    free = (*FREE_ON_RESUME, *MEMORY_ALONE)
    new = [one.path for one in tried if not any(one.path == name or one.path.startswith(f"{name}.") for name in free)]
    kept = f"{config.run_dir} keeps the checkpoint of step {int(steps[-1][5:])}: --resume continues from it"
    if not new:
        return f"{kept}, with these too"
    rest = f"{' and '.join(new)} need{'s' if len(new) == 1 else ''} a new run"
    return f"{kept}; {rest}"
