"""Samples that must be scored together, and rewards without a gradient, known without loading anything."""

from __future__ import annotations

from typing import Any

from rewards.base import RewardSettings, Scope, WrapperSettings


def known_scope(settings: RewardSettings) -> Scope:
    """The scope that a reward's settings imply; ``sample`` also if only the built reward shows it (code, a server)."""
    return settings.compares() or "sample"


def declared(kind: type[RewardSettings]) -> tuple[bool | None, Scope | None]:
    """Gradient and scope of a kind with default settings; None if they depend on a reward inside, or on a server."""
    from rewards.call import CallableReward
    from rewards.wrappers.mixture import Member

    unknown = CallableReward(kind="any:reward")
    # the two methods read no required setting but the rewards inside
    inside: dict[str, Any] = {"reward": unknown, "parts": {"any": Member(reward=unknown)}}
    settings = kind.model_construct(None, **inside)
    return settings.gradient(), settings.compares()


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


def runs_users_code(settings: RewardSettings) -> bool:
    """Whether scoring calls code from outside this package, in this process and without a cache."""
    from rewards.call import CallableReward
    from rewards.wrappers.cached import Cached
    from rewards.wrappers.mixture import Mixture
    from rewards.wrappers.pool import Pool

    if isinstance(settings, Mixture):
        return any(runs_users_code(member.reward) for member in settings.parts.values())
    if isinstance(settings, WrapperSettings):
        return not isinstance(settings, Cached | Pool) and runs_users_code(settings.reward)
    return isinstance(settings, CallableReward)


def without_gradient(settings: RewardSettings, place: str = "reward", answer: bool | None = False) -> dict[str, str]:
    """Innermost rewards that leave a reward without gradient: place such as ``reward.parts.a.reward`` -> kind.

    Args:
        answer: of :meth:`~rewards.base.RewardSettings.gradient`; None finds those that leave it unknown.
    """
    from rewards.wrappers.mixture import Mixture

    inner: dict[str, RewardSettings] = {}
    if isinstance(settings, Mixture):
        added = {name: part.reward for name, part in settings.parts.items() if part.gate is None}
        inner = {f"{place}.parts.{name}.reward": reward for name, reward in added.items()}
    elif isinstance(settings, WrapperSettings) and settings.passes_gradient:
        inner = {f"{place}.reward": settings.reward}
    found: dict[str, str] = {}
    for where, reward in inner.items():
        found |= without_gradient(reward, where, answer) if reward.gradient() is answer else {}
    return found or {place: getattr(settings, "kind", "")}
