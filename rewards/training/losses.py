"""Losses of reward models: pure functions of scores, one number per term ``[M]``; callers take the mean.

``chosen`` and ``rejected`` are scores ``[M]`` of the better and the worse sample of a pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    np, torch, F = lazy("numpy"), lazy("torch"), lazy("torch.nn.functional")


NODES = 64
"""Nodes of the Gauss-Hermite rule; the mean is exact to 2e-5 for deviations up to 5, to 3e-3 for 10."""


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """``-log sigmoid(chosen - rejected - margin)`` (Bradley and Terry 1952)."""
    return -F.logsigmoid(chosen - rejected - margin)


def rao_kupper(first: Tensor, second: Tensor, outcome: Tensor, k: float = 5.0) -> Tensor:
    """Bradley-Terry with ties (Rao and Kupper 1967), as VideoAlign trains (arXiv 2501.13918, k = 5).

    ``P(first wins) = sigmoid(first - second - log k)``; what both leave is ``P(tie)``. The three sum to 1.

    Args:
        outcome: ``[M]`` 1 = first is better, 0 = tie, -1 = second is better.
        k: above 1; how wide the ties are. At 1 there are none.
    """
    gap, width = first - second, math.log(k)
    win, lose = F.logsigmoid(gap - width), F.logsigmoid(-gap - width)
    tie = win + lose + math.log(k * k - 1)
    return -torch.where(outcome > 0, win, torch.where(outcome < 0, lose, tie))


def per_dimension(first: Tensor, second: Tensor, labels: tuple[Tensor, Tensor], k: float = 5.0) -> Tensor:
    """:func:`rao_kupper` of every dimension, the mean over those with labels: VideoAlign's three scores. ``[M]``

    Args:
        first: ``[M, K]`` scores of the first sample, likewise ``second``.
        labels: ``[M, K]`` of both samples; the higher one is better, equal ones are a tie, NaN is unknown.

    Returns:
        0 for a pair without labels.
    """
    gap = labels[0] - labels[1]
    known = gap.isfinite()
    each = rao_kupper(first, second, torch.where(known, gap, 0.0), k)
    return known_mean(each, known)


def criterion_error(scores: Tensor, labels: Tensor, form: str = "squared") -> Tensor:
    """Error of every criterion's score, the mean over those with labels (MJ-Video, arXiv 2502.01719). ``[M]``

    Args:
        scores: ``[M, C]``.
        labels: ``[M, C]``, NaN if a criterion does not apply.
        form: squared = ``(score - label)^2`` | logistic = cross-entropy of sigmoid(score) with a label in 0 .. 1.
    """
    known = labels.isfinite()
    target = torch.where(known, labels, 0.0).to(scores)
    if form == "squared":
        return known_mean((scores - target).square(), known)
    return known_mean(F.binary_cross_entropy_with_logits(scores, target, reduction="none"), known)


def part_order(first: Tensor, second: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
    """:func:`bradley_terry` of every part's scores ``[M, A]``, the mean over parts whose labels differ. ``[M]``"""
    gap = labels[0] - labels[1]
    known = gap.isfinite() & (gap != 0)
    return known_mean(bradley_terry(gap.sign() * first, gap.sign() * second), known)


def idle_gates(gates: Tensor, labels: Tensor, groups: Sequence[int]) -> Tensor:
    """``-log(1 - gate)`` of every criterion that does not apply: MJ-Video's gate loss. ``[M]``

    A group of which no criterion applies has none, as its gates sum to 1 whatever they are.

    Args:
        gates: ``[M, C]``, softmax within each group.
        labels: ``[M, C]``, NaN if a criterion does not apply.
        groups: number of criteria in each group.
    """
    known = labels.isfinite().split(list(groups), -1)
    idle = [~one & one.any(-1, keepdim=True) for one in known]
    return torch.where(torch.cat(idle, -1), -(1 - gates).clamp_min(1e-5).log(), 0.0).sum(-1)


def known_mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean of each row ``[M, K]`` over the known ones, 0 if there are none. ``[M]``"""
    return torch.where(known, values, 0.0).sum(-1) / known.sum(-1).clamp_min(1)


def win_tie(first: Tensor, second: Tensor, mu: Tensor) -> Tensor:
    """Cross-entropy of ``sigmoid(first - second)`` with ``mu [M]``: 1 = first wins, 1/2 = tie (SoliReward's BT-WT)."""
    return -mu * F.logsigmoid(first - second) - (1 - mu) * F.logsigmoid(second - first)


def ranking_margin(chosen: Tensor, rejected: Tensor, margin: float) -> Tensor:
    """``relu(rejected - chosen + margin)``: nothing is gained beyond the margin."""
    return F.relu(rejected - chosen + margin)


def triplet(text: Tensor, chosen: Tensor, rejected: Tensor, margin: float = 0.3) -> Tensor:
    """``relu(|text - chosen|^2 - |text - rejected|^2 + margin)`` of unit rows ``[M, D]`` (arXiv 2402.09872)."""
    near, far = (-(text - image).square().sum(-1) for image in (chosen, rejected))
    return ranking_margin(near, far, margin)


def regression(score: Tensor, target: Tensor) -> Tensor:
    """Squared error."""
    return (score - target).square()


def gaussian_difference(chosen: Tensor, chosen_std: Tensor, rejected: Tensor, rejected_std: Tensor) -> Tensor:
    """``-E log sigmoid(z)``, z ~ N(chosen - rejected, chosen_std^2 + rejected_std^2): scores with an uncertainty.

    HPSv3 (arXiv 2508.03789) samples z a thousand times; here the mean is taken by a Gauss-Hermite rule, the same every
    time. Without deviation it is :func:`bradley_terry`.

    Args:
        chosen_std: ``[M]`` standard deviations, not negative.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    spread = torch.hypot(chosen_std, rejected_std)[:, None]
    z = (chosen - rejected)[:, None] + spread * torch.as_tensor(nodes, dtype=spread.dtype, device=spread.device)
    share = torch.as_tensor(weights / weights.sum(), dtype=spread.dtype, device=spread.device)
    return -(F.logsigmoid(z) * share).sum(-1)


def first_token(logp: Tensor, length: Tensor, alpha: float = 0.1) -> Tensor:
    """Cross-entropy of an answer whose first token is the verdict and weighs ``alpha`` alone (PaCo-Reward).

    ``-(alpha log p(y_0) + (1 - alpha) mean over the further tokens of log p(y_i))``; an answer of one token is all
    verdict.

    Args:
        logp: ``[M, L]`` log-probabilities of the answers' tokens; those beyond ``length`` are ignored.
        length: ``[M]`` tokens of each answer, at least 1.
    """
    inside = torch.arange(logp.shape[1], device=logp.device) < length[:, None]
    rest = torch.where(inside, logp, 0.0)[:, 1:].sum(1) / (length - 1).clamp_min(1)
    share = torch.where(length > 1, alpha, 1.0)
    return -(share * logp[:, 0] + (1 - share) * rest)


def standard_normal_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``KL(N(mean, exp(log_variance)) | N(0, 1))`` summed over the last axis: what VPL's latent user costs."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's hinge ``(relu(1 - real) + relu(1 + fake)) / 2`` of paired scores (Adv-GRPO, arXiv 2511.20256)."""
    return (F.relu(1 - real) + F.relu(1 + fake)) / 2
