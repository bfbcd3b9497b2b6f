"""What must be scored together, as far as settings tell: nothing is loaded, imported or asked."""

from __future__ import annotations

from rewards.base import RewardSettings, Scope

ORDER: tuple[Scope, ...] = ("sample", "group", "batch")


def known_scope(settings: RewardSettings) -> Scope:
    """The scope that a reward's settings imply; ``sample`` also where only building it can tell (code, a server)."""
    from rewards.consistent import Consistent
    from rewards.mixture import Mixture

    found: list[Scope] = ["sample"]
    if isinstance(settings, Mixture):
        for member in settings.parts.values():
            found.append(known_scope(member.reward))
            found += [scope for scope in ORDER if scope == member.normalise]
        found += ["batch"] if settings.how == "log_tamed" else []
    else:
        own = getattr(settings, "scope", None)
        found += [scope for scope in ORDER if scope == own]
        found += ["group"] if isinstance(settings, Consistent) else []
        inner = getattr(settings, "reward", None)
        found += [known_scope(inner)] if isinstance(inner, RewardSettings) else []
    return max(found, key=ORDER.index)


def has_parts(settings: RewardSettings) -> bool:
    """Whether a reward that compares samples also scores them one by one, in parts of its scores."""
    from rewards.consistent import Consistent
    from rewards.mixture import Mixture

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
