"""Roles that a run holds beside its policy, and which of them are copies of the trained weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.config.settings import Config


def reference_is_base(config: Config) -> bool:
    """Whether ``reference`` is the network with its LoRA switched off, which takes no memory.

    A LoRA that starts from zero leaves the base as it is. A LoRA that continues another (``policy.init``) starts
    elsewhere, so its reference is a copy of the values at the start.
    """
    return config.policy.kind == "lora" and config.policy.init is None


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
