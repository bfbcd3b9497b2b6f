"""Quantities that change during training, and the times at which a loss is computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from align.maths.seeds import derive
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Points = Annotated[list[tuple[Annotated[int, Field(ge=0)], float]], Field(min_length=1)]
"""``[[rollout, value], ...]`` in the order of the rollouts, counted from 0."""

OldPolicy = Literal["on_policy", "linear", "delayed"]
"""Schedule of the old policy's decay; see :func:`old_policy_decay`."""


def value_at(points: Sequence[tuple[int, float]], rollout: int) -> float:
    """Value of a schedule: linear between its points, constant before the first and after the last."""
    if rollout <= points[0][0]:
        return points[0][1]
    for (start, low), (end, high) in pairwise(points):
        if rollout <= end:
            return low + (high - low) * (rollout - start) / (end - start)
    return points[-1][1]


def unordered(points: Sequence[tuple[int, float]]) -> str:
    """The problem if the rollouts of a schedule do not rise, else ''."""
    later = next((b for (a, _), (b, _) in pairwise(points) if b <= a), None)
    return "" if later is None else f"rollout {later} should stand before the point to its left"


def old_policy_decay(schedule: OldPolicy, step: int) -> float:
    """Decay of the old policy after rollout ``step`` (from 1): DiffusionNFT's schedules 0, 1 and 2."""
    if schedule == "on_policy":
        return 0.0
    if schedule == "linear":
        return min(0.001 * step, 0.5)
    return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)


def stratified_times(seeds: list[int], count: int, span: tuple[float, float]) -> Tensor:
    """Times ``[N, count]``, one uniform draw in each of ``count`` equal slices of ``span``.

    The draws of row i depend on ``seeds[i]`` alone. Stratifying removes most of the variance that the choice of time
    adds to a loss (MMaDA, arXiv 2505.15809, uses one shared offset for the same end).
    """
    low, high = span
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(derive(seed, "times"))
        rows.append(torch.rand(count, generator=generator))
    u = (torch.arange(count) + torch.stack(rows)) / count
    return low + (high - low) * u
