"""Rewards -> groups and samples with little signal, which a run leaves out."""

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


def most_spread(rewards: Tensor, group: Tensor, count: int) -> Tensor:
    """The ``count`` samples of each group whose rewards have the largest variance (PODS, arXiv 2504.13818).

    They are the ``k`` highest and the ``count - k`` lowest of the group for some ``k``. Of equal variances the one
    with the most even ``k`` is taken.

    Args:
        rewards: ``[N]``; missing ones (not finite) are never chosen.
        group: ``[N]`` integers, one per prompt.
        count: samples to choose in each group, at least 1; all known ones where there are fewer.

    Returns:
        ``[N]`` bool.
    """
    chosen = torch.zeros(len(rewards), dtype=torch.bool)
    for rows in members(group):
        known = rows[rewards[rows].isfinite()]
        if len(known) <= count:
            chosen[known] = True
            continue
        order = known[rewards[known].double().argsort(descending=True, stable=True)]
        splits = sorted(range(count + 1), key=lambda high: abs(2 * high - count))
        subsets = [torch.cat([order[:high], order[len(order) - count + high :]]) for high in splits]
        variances = [float(rewards[subset].double().var(correction=0)) for subset in subsets]
        chosen[subsets[variances.index(max(variances))]] = True
    return chosen
