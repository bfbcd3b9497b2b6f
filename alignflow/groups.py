"""Samples of one prompt among those of many."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def members(group: Tensor) -> list[Tensor]:
    """Rows of each group, in rising order of the groups and of the rows.

    The cost is that of a sort, however many groups there are.

    Args:
        group: ``[N]`` integers, equal for the samples of one prompt; in any order, with any gaps.
    """
    counts = group.unique(return_counts=True)[1]
    return list(group.argsort(stable=True).split(counts.tolist()))
