"""Rewards -> groups that teach nothing, which a run leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignflow.groups import members
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def uninformative(rewards: Tensor, group: Tensor, mean_above: float, std_below: float) -> Tensor:
    """Samples of groups that are solved: mean reward above one bound and deviation below another (Edit-R1,
    arXiv 2510.16888).

    Args:
        rewards: ``[N]``; missing ones (not finite) count for nothing.
        group: ``[N]`` integers, one per prompt.
        mean_above: bound of the group's mean, exclusive.
        std_below: bound of the group's standard deviation (of the population), exclusive.

    Returns:
        ``[N]`` bool, the same for all samples of a group; False for a group without rewards.
    """
    void = torch.zeros(len(rewards), dtype=torch.bool)
    for rows in members(group):
        values = rewards[rows].double()
        known = values[values.isfinite()]
        if len(known):
            void[rows] = bool(known.mean() > mean_above) and bool(known.std(correction=0) < std_below)
    return void
