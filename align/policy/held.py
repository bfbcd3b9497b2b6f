"""Roles that a run holds beside its policy, and which of them are copies of the trained weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.config.settings import Config


def reference_is_base(config: Config) -> bool:
    """Whether ``reference`` is the network with its LoRA or other additions switched off, which takes no memory.

    A LoRA that starts from zero leaves the base as it is. A LoRA that continues another (``policy.init``) starts
    elsewhere, so its reference is a copy of the values at the start. The reference of a gate is the base without
    experts, although the gate starts from their mean.
    """
    policy = config.policy
    return policy.kind != "full" and getattr(policy, "init", None) is None


def starts_at_base(config: Config) -> bool:
    """Whether the policy computes as the base before the first update."""
    return config.policy.kind != "gate"


def copies(config: Config) -> tuple[str, ...]:
    """Names of the roles that are copies of the policy's weights: those of the recipe, and those of settings.

    ``train.ema`` adds ``ema`` and ``rollout.overlap: next`` adds ``ahead``.
    """
    names = [
        name for name in config.recipe.largest.roles(config) if not (name == "reference" and reference_is_base(config))
    ]
    if config.train.ema:
        names.append("ema")
    if getattr(config.rollout, "overlap", "none") == "next":
        names.append("ahead")
    return tuple(dict.fromkeys(names))
