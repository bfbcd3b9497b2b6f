"""Agreement of scores with preferences: accuracy with and without ties, its uncertainty, and order effects.

Pairs have a gap ``[M]``, the score of the first less that of the second (NaN = one had none), and a label ``[M]``: 1 =
people prefer the first, -1 = the second, 0 = a tie. Numpy alone.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Source = Literal["zero", "given", "validation", "test"]


class Threshold(BaseModel):
    """Gaps up to it count as ties, and where it comes from; ``test`` means it was tuned on the measured pairs."""

    model_config = ConfigDict(frozen=True)

    value: float = Field(0.0, ge=0)
    source: Source = "zero"


class Interval(BaseModel):
    """A share with the ends of its bootstrap interval, of ``count`` pairs; None if there are none.

    A single cluster gives no estimate of the spread: it has a share and no interval.
    """

    model_config = ConfigDict(frozen=True)

    value: float | None
    low: float | None
    high: float | None
    count: int


def verdicts(gap: np.ndarray, threshold: float) -> np.ndarray:
    """``[M]`` 1, 0 or -1: the sign of the gap, 0 up to the threshold; NaN stays."""
    return np.where(np.abs(gap) <= threshold, 0.0, np.sign(gap))


def right_without_ties(gap: np.ndarray, label: np.ndarray) -> np.ndarray:
    """``[M]`` 1 or 0 if the sign is right or not, NaN where people saw a tie or a score is missing.

    Equal scores of a pair that people did decide are wrong, as VideoAlign counts them.
    """
    right = (np.sign(gap) == label).astype(float)
    return np.where((label == 0) | np.isnan(gap), np.nan, right)


def right_with_ties(gap: np.ndarray, label: np.ndarray, threshold: float) -> np.ndarray:
    """``[M]`` 1 or 0 of the three-way verdict, NaN if a score is missing (Deutsch et al., arXiv 2305.14324)."""
    return np.where(np.isnan(gap), np.nan, (verdicts(gap, threshold) == label).astype(float))


def tune(gap: np.ndarray, label: np.ndarray) -> float:
    """The threshold with the best accuracy with ties, the smallest of several: 0 or one of the gaps' sizes.

    Exact: between neighbouring sizes nothing changes.
    """
    known = ~np.isnan(gap)
    size, sign, label = np.abs(gap[known]), np.sign(gap[known]), label[known]
    order = np.argsort(size, kind="stable")
    size, sign, label = size[order], sign[order], label[order]
    # below each place everything is a tie, from it on the sign decides
    ties = np.concatenate([[0], np.cumsum(label == 0)])
    signs = np.concatenate([np.cumsum((sign == label)[::-1])[::-1], [0]])
    candidates = np.concatenate([[0.0], size])
    places = np.searchsorted(size, candidates, side="right")
    return float(candidates[np.argmax((ties + signs)[places])])


def interval(
    right: np.ndarray, cluster: np.ndarray, *, draws: int = 1000, coverage: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of ``right [M]`` without its NaN, and the percentile interval over resampled clusters.

    Args:
        cluster: ``[M]`` what was collected together, such as the number of the prompt: pairs of one prompt are not
            independent, so whole prompts are resampled, with all their pairs.
        draws: bootstrap samples.
    """
    known = ~np.isnan(right)
    if not known.any():
        return Interval(value=None, low=None, high=None, count=0)
    right = right[known]
    _, place = np.unique(cluster[known], return_inverse=True)
    total, hits = np.bincount(place), np.bincount(place, weights=right)
    if len(total) < 2:
        return Interval(value=float(right.mean()), low=None, high=None, count=len(right))
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), size=draws)
    low, high = np.quantile((times @ hits) / (times @ total), [(1 - coverage) / 2, (1 + coverage) / 2])
    return Interval(value=float(right.mean()), low=float(low), high=float(high), count=len(right))


class Order(BaseModel):
    """Result of scoring each pair in both orders.

    Args:
        pairs: pairs scored both ways.
        consistency: share whose verdict is the same both ways.
        position_bias: share of all verdicts for whatever came first less that for whatever came second; 0 is fair,
            1 always takes the first.
        largest_change: of a gap.
    """

    model_config = ConfigDict(frozen=True)

    pairs: int
    consistency: float | None
    position_bias: float | None
    largest_change: float | None


def order(forward: np.ndarray, swapped: np.ndarray, threshold: float = 0.0) -> Order:
    """Compare gaps ``[M]`` of the same pairs given in their order and given swapped, both first less second of theirs.

    A judge that does not care has ``swapped == -forward``.
    """
    known = ~(np.isnan(forward) | np.isnan(swapped))
    if not known.any():
        return Order(pairs=0, consistency=None, position_bias=None, largest_change=None)
    forward, swapped = forward[known], swapped[known]
    there, back = verdicts(forward, threshold), verdicts(swapped, threshold)
    return Order(
        pairs=len(forward),
        consistency=float(np.mean(there == -back)),
        position_bias=float(np.mean(np.concatenate([there, back]))),
        largest_change=float(np.max(np.abs(forward + swapped))),
    )


class Report(BaseModel):
    """Result of a benchmark."""

    pairs: int
    ties: int
    missing: int
    equal_scores: int
    threshold: Threshold
    without_ties: Interval
    with_ties: Interval
    order: Order


def report(
    gap: np.ndarray,
    label: np.ndarray,
    cluster: np.ndarray,
    threshold: Threshold,
    order: Order,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Report:
    """Accuracy with and without ties of ``gap``, ``label`` and ``cluster``, ``[M]`` each, with their intervals."""

    def measured(right: np.ndarray) -> Interval:
        return interval(right, cluster, draws=draws, seed=seed)

    return Report(
        pairs=len(gap),
        ties=int(np.sum(label == 0)),
        missing=int(np.isnan(gap).sum()),
        equal_scores=int(np.sum(gap == 0)),
        threshold=threshold,
        without_ties=measured(right_without_ties(gap, label)),
        with_ties=measured(right_with_ties(gap, label, threshold.value)),
        order=order,
    )
