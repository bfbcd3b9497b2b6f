"""Gates over experts that depend on the flow time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def time_features(t: Tensor, count: int) -> Tensor:
    """Cosines, then sines, of times ``[N]`` in [0, 1] -> ``[N, count]``; the sinusoids of diffusers at ``1000 t``.

    Args:
        count: even; the periods of the ``count / 2`` frequencies grow geometrically from 0.002 pi to nearly 20 pi.
    """
    half = count // 2
    frequencies = 1000 * torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angle = t.float()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], 1)


def gate(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Shares ``softmax(W e(t) + b)`` of K experts at times ``[N]``: ``[N, K]``, each row adds up to 1.

    Args:
        weight: ``[K, E]``, W for the E features ``e(t)`` of :func:`time_features`.
        bias: ``[K]``, b.
    """
    features = time_features(t, weight.shape[1])
    # no matrix product, which autocast would round
    return ((features[:, None] * weight).sum(-1) + bias).softmax(-1)
