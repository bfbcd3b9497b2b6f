"""Which samples must be scored together, derived from settings without loading anything."""

from __future__ import annotations

from rewards.base import RewardSettings, Scope


def known_scope(settings: RewardSettings) -> Scope:
    """The scope that a reward's settings imply; ``sample`` also where only building it can tell (code, a server)."""
    return settings.compares() or "sample"


def has_parts(settings: RewardSettings) -> bool:
    """Whether a reward that compares samples also scores them one by one, in parts of its scores."""
    from rewards.wrappers.consistent import Consistent
    from rewards.wrappers.mixture import Mixture

    if isinstance(settings, Mixture):
        rewards = [member.reward for member in settings.parts.values()]
    else:
        inner = getattr(settings, "reward", None)
        if not isinstance(inner, RewardSettings):
            return False
        if not isinstance(settings, Consistent):  # a wrapper: what it wraps compares, not it
            return has_parts(inner)
        rewards = [inner]
    return any(known_scope(reward) == "sample" or has_parts(reward) for reward in rewards)
