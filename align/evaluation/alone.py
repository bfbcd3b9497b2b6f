"""Scores of single samples: one per prompt, as in evaluation, with no others to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from align.config.sections import Evaluate

from rewards.base import Reward, RewardError, Scores


def scored_alone(rewards: Mapping[str, Reward], settings: Evaluate, trained: str = "reward") -> dict[str, Reward]:
    """The ``rewards`` that score a single sample, as a whole or in parts.

    The trained reward is left out where it does not; others were asked for, so they are refused.

    Raises:
        RewardError: names the reward, and what to do.
    """
    kept = {}
    for name, reward in rewards.items():
        compares = reward.scope != "sample"
        if compares and name == settings.gold:
            raise RewardError(
                f"evaluate.gold {name!r}: {_why(reward)}, so it has no single value; name a reward that scores samples "
                "one by one"
            )
        if compares and not reward.apart and name != trained:
            raise RewardError(f"evaluate.rewards.{name}: {_why(reward)}; name a reward that scores samples one by one")
        if not compares or reward.apart:
            kept[name] = reward
    return kept


def note(name: str, reward: Reward) -> str | None:
    """Note for the user about a reward whose held-out score is replaced; None if it is not."""
    if reward.scope == "sample":
        return None
    shown = f"its parts are scored instead: {', '.join(reward.apart)}" if reward.apart else "it is not scored"
    return f"held-out {name}: {_why(reward)}; {shown}"


def columns(name: str, reward: Reward, scores: Scores) -> dict[str, tuple[Tensor, dict[int, str]]]:
    """Held-out scores ``[N]`` of a reward and the reasons for missing ones: its own, or those of its parts."""
    if reward.scope == "sample":
        return {name: (scores.values, dict(scores.reasons))}
    found = {}
    for part in reward.apart:
        values = scores.parts.get(part, torch.full_like(scores.values, torch.nan))
        missing = (~values.isfinite()).nonzero().flatten().tolist()
        found[f"{name}/{part}"] = (values, {row: scores.reasons.get(row, "no reason given") for row in missing})
    return found


def _why(reward: Reward) -> str:
    others = "the samples of a prompt" if reward.scope == "group" else "all samples scored with it"
    return f"{reward.name!r} compares {others}, and evaluation has one sample per prompt"
