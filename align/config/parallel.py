"""Division of a run among processes beyond its prompts, and settings that it excludes. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from align.config import registry
from alignflow.kinds import listing
from alignflow.settings import Problems, Settings

if TYPE_CHECKING:
    from align.config.settings import Config

SPLITS = ("auto", "native", "flash", "flash_hub", "flash3_hub")
"""Attention backends that compute with tokens spread over processes, with a gradient."""


class Parallel(Settings):
    """Division of a run among processes, beside its prompts, described in docs/nodes.md."""

    context: int = Field(
        1,
        ge=1,
        le=1024,
        description="processes that compute every sample together, each a part of its tokens (context parallelism), "
        "for long videos; 1 = every process computes whole samples",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=65_536,
        description="copies of a network that the launch shards (FSDP2): each is spread over an equal part of the "
        "processes, such as those of one machine (HSDP); 1 = one copy over all processes",
    )


def problems(config: Config) -> Problems:
    """(setting, problem) of a config whose samples cannot be divided among processes on any installation."""
    ways, found = config.parallel.context, []
    if ways == 1:
        return []
    where, kind = "parallel.context", config.generator.kind
    if kind in registry.generators() and not registry.declared(kind, "splits_tokens"):
        able = listing(one for one in registry.generators() if registry.declared(one, "splits_tokens"))
        found.append((where, f"{kind} cannot divide a sample among processes; these can: {able}. Use 1"))
    if config.policy.kind not in ("lora", "full"):
        found.append(
            ("policy.kind", f"a policy of kind {config.policy.kind} does not go with {where}: use lora or full")
        )
    if config.memory.attention not in SPLITS:
        said = f"{config.memory.attention} cannot attend to tokens of other processes ({where}); use"
        found.append(("memory.attention", f"{said} {listing(SPLITS)}"))
    if config.memory.compile != "none":
        found.append(("memory.compile", f"a network divided by {where} is not compiled: use none"))
    if config.memory.swap_blocks:
        found.append(("memory.swap_blocks", f"blocks of a network divided by {where} are not swapped: use 0"))
    if getattr(config.rollout, "engine", None) is not None:
        found.append(
            ("rollout.engine", f"an engine samples by itself and does not go with {where}: leave one of them out")
        )
    return found
