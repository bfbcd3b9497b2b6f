"""Combination of a sample's rewards into one: pure tensor functions; missing (NaN) in, missing out.

``values [N, K]`` are K rewards of N samples, ``weights [K]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from alignflow.groups import members
from alignflow.lazy import lazy
from rewards.base import SCOPES, Scope

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def widest(scopes: Sequence[Scope]) -> Scope:
    """The scope of what depends on all of these."""
    return SCOPES[max((SCOPES.index(scope) for scope in scopes), default=0)]


def groups_of(prompts: Sequence[str], group: Tensor | None = None) -> Tensor:
    """``group`` on the CPU, or, if there is none, numbers by which equal prompts are one group."""
    if group is not None:
        return group.cpu()
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(prompt, len(first)) for prompt in prompts])


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """``sum_k w_k x_k``."""
    return (values * weights).sum(1)


def harmonic(values: Tensor, weights: Tensor, eps: float = 1e-8) -> Tensor:
    """``1 / sum_k w_k / (x_k + eps)`` with weights of sum 1 (RPO's lambda-harmonic reward): near the worst of them.

    Values below 0 have no harmonic mean: NaN.
    """
    return 1 / (weights / weights.sum() / (_not_negative(values) + eps)).sum(1)


def geometric(values: Tensor, weights: Tensor) -> Tensor:
    """``prod_k x_k^w_k`` with weights of sum 1; NaN for values below 0."""
    return product(values, weights / weights.sum())


def product(values: Tensor, weights: Tensor) -> Tensor:
    """``prod_k x_k^w_k``; NaN for values below 0."""
    return _not_negative(values).pow(weights).prod(1)


def log_tamed(values: Tensor, weights: Tensor) -> Tensor:
    """:func:`weighted` after :func:`log_tame`."""
    return weighted(log_tame(values), weights)


def lower_bound(values: Tensor, weights: Tensor, discount: float) -> Tensor:
    """``mean - discount * std`` over the K rewards, weighted, std of the population: disagreement costs.

    The gradient of the spread is 0 if they all agree.
    """
    share = weights / weights.sum()
    mean = weighted(values, share)
    variance = weighted((values - mean[:, None]).square(), share)
    agreed = variance == 0
    return mean - discount * torch.where(agreed, 1.0, variance).sqrt().masked_fill(agreed, 0.0)


def _not_negative(values: Tensor) -> Tensor:
    return torch.where(values >= 0, values, torch.nan)


def log_tame(rewards: Tensor, threshold: float | Literal["mean", "median"] = "mean") -> Tensor:
    """``log(1 + r)`` for those rewards that spread much for their size, before a weighted sum (PaCo-RL).

    A reward whose ``h = std / mean`` over the samples exceeds the threshold would rule the sum; the others are left.

    Args:
        rewards: ``[N, K]``, K rewards of each sample, means above 0; missing ones are NaN and stay so.
        threshold: of h: a number, or the mean or median of all K.

    Raises:
        ValueError: a reward with mean <= 0, or one to be tamed with a value <= -1.
    """
    mean = rewards.nanmean(0)
    if bool((mean <= 0).any()):
        raise ValueError(f"log_tame needs rewards with a positive mean, given means {mean.tolist()}")
    spread = (rewards - mean).square().nanmean(0).sqrt() / (mean + 1e-6)
    if threshold == "mean":
        limit = spread.nanmean()
    elif threshold == "median":
        limit = spread.nanmedian()
    else:
        limit = torch.as_tensor(threshold, dtype=spread.dtype, device=spread.device)
    wild = spread > limit * (1 + 1e-5)  # equal spreads stay equal despite rounding
    if bool((rewards[:, wild] <= -1).any()):
        raise ValueError("log_tame needs rewards above -1")
    return torch.where(wild, torch.log1p(rewards.clamp_min(-1)), rewards)


def standardised(values: Tensor, index: Tensor) -> Tensor:
    """``(x - mean) / deviation`` of ``values [N]`` among those of equal ``index [N]``; NaN stays and does not count.

    Mean and deviation (of the population) are constants to the gradient. Values without spread become 0.
    """
    out = torch.full_like(values, torch.nan)
    for some in members(index):
        rows = some[values[some].isfinite()]
        known = values[rows].detach()
        if not len(known):
            continue
        deviation = known.std(correction=0)
        # equal scores differ by rounding at most: dividing by that would make noise of it
        flat = deviation <= 1e-6 * known.abs().max()
        out[rows] = (values[rows] - known.mean()) / torch.where(flat, torch.inf, deviation)
    return out


def knn_smooth(
    values: Tensor, embedding: Tensor, group: Tensor, neighbours: int = 5, similarity: float = 0.9
) -> Tensor:
    """``(r + sum_i s_i r_i) / (1 + sum_i s_i)`` over a sample's nearest neighbours (RewardFusion): alike scores alike.

    Args:
        values: ``[N]``; a missing one stays missing and is nobody's neighbour.
        embedding: ``[N, D]``, compared by cosine.
        group: ``[N]``; neighbours are of the same group, because scores for two prompts do not compare.
        neighbours: at most so many count, the most alike.
        similarity: cosine a neighbour must exceed.
    """
    unit = torch.nn.functional.normalize(embedding.float(), dim=-1)
    near = unit @ unit.T
    known = values.isfinite()
    allowed = (group[:, None] == group) & known & (near > similarity)
    allowed.fill_diagonal_(False)
    top = torch.where(allowed, near, 0.0).topk(min(neighbours, len(values)), dim=1)
    others = (top.values * torch.where(known, values, 0.0)[top.indices]).sum(1)
    return (values + others) / (1 + top.values.sum(1))
