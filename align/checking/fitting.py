"""Whether a run fits on a card, and which settings make it fit. No weights are loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import ValidationError

from align.checking.architectures import on_meta, parts_of
from align.checking.estimate import CONTEXT, FRAGMENTS, GB, Item, estimate
from align.checking.remedies import remedies
from align.config.load import overridden
from alignflow.errors import ConfigError

if TYPE_CHECKING:
    from align.config.settings import Config


def card_bytes(text: str) -> float:
    """``24gb``, ``24`` -> bytes; raises ConfigError."""
    number = text.lower().removesuffix("gb").strip()
    try:
        size = float(number)
    except ValueError:
        size = math.nan
    if not size > 0:
        raise ConfigError(f"--card {text}: a size in GB, such as 24gb")
    return size * GB


def savings(config: Config) -> list[tuple[str, float]]:
    """(override, bytes saved) of every change that saves memory by itself, largest first."""
    here, found = estimate(config).bytes, []
    for remedy in remedies(config):
        if remedy.value is not None:
            saved = here - estimate(overridden(config, remedy.change)).bytes
            if saved > 0.05 * GB:
                found.append((remedy.change, saved))
    return sorted(found, key=lambda pair: -pair[1])


def fitting(config: Config, changes: list[str], size: float) -> list[str]:
    """The shortest prefix of ``changes`` with which the run fits in ``size`` bytes; [] if even all are not enough."""
    for number, change in enumerate(changes, 1):
        config = overridden(config, change)
        if estimate(config).bytes <= size:
            return changes[:number]
    return []


MISFIT = "does not fit in"


def lines(config: Config, card: str | None = None) -> list[str]:
    """Lines of the estimate; with a card, also whether the run fits and which changes would make it fit."""
    found = estimate(config)
    rows = [
        *found.kept,
        *(Item(f"{name}: {i.name}", i.bytes, i.how) for name in found.phases for i in found.phases[name]),
    ]
    text = ["memory, an estimate in GB of 2^30 bytes; nothing was loaded"]
    text += [f"  {item.name:24} {item.bytes / GB:7.2f}  {item.how}".rstrip() for item in rows]
    need = f"{found.bytes / GB:.1f} GB with {FRAGMENTS - 1:.0%} for fragments and {CONTEXT / GB:g} GB for CUDA"
    text.append(f"peak while {found.peak}: {need}")
    if card is None:
        return text
    size = card_bytes(card)
    if found.bytes <= size:
        return [*text, f"fits in {size / GB:g} GB"]
    text.append(f"{MISFIT} {size / GB:g} GB; savings of each change by itself, largest first:")
    found_savings = savings(config)
    text += [f"  {change:44} {saved / GB:6.1f} GB" for change, saved in found_savings]
    together = fitting(config, [change for change, _ in found_savings], size)
    text.append(f"together these fit: {' '.join(together)}" if together else "all of them together are not enough")
    return text + _swapping(config, size)


def _swapping(config: Config, size: float) -> list[str]:
    """A line with the number of swapped blocks with which the run would fit in ``size`` bytes, if there is one."""
    changes = fitting_swap(config, size)
    return [f"without changing the stored weights, these fit: {' '.join(changes)}"] if changes else []


def fitting_swap(config: Config, size: float) -> list[str]:
    """The overrides that keep all that can wait on the CPU there, with the fewest swapped blocks that fit in ``size``.

    Empty where all weights are trained, weights are quantised, the network is compiled, a recipe allows no gradient
    checkpointing, or even all blocks are not enough.
    """
    from generators.swap import blocks

    path = config.generator.path
    parts = parts_of(config.generator.kind, path)
    if config.policy.kind == "full" or config.memory.quantise != "none" or not parts:
        return []
    fixed = ["memory.roles=cpu", "memory.trajectories=cpu", "train.gradient_checkpointing=true"]
    networks = [on_meta(parts[name]) for name in ("transformer", "transformer_2") if name in parts]
    for number in range(config.memory.swap_blocks, min(len(blocks(one)) for one in networks) + 1):
        changes = [*fixed, f"memory.swap_blocks={number}"]
        changed = config
        try:
            for change in changes:
                changed = overridden(changed, change)
        except (ConfigError, ValidationError):
            return []
        if estimate(changed).bytes <= size:
            return changes
    return []
