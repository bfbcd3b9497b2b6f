"""Attention to more keys than a network has: decoupled, each with its own softmax."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def decoupled(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` per head, to be added to a layer's own attention (IP-Adapter, arXiv 2308.06721).

    Args:
        q: ``[N, L, D]`` queries of the layer, normalised as the layer does.
        k: ``[N, M, D]`` keys of the added tokens.
        v: ``[N, M, D]`` their values; the result is zero where all of them are.
        heads: number of heads, of ``d = D / heads`` dimensions each.

    Returns:
        ``[N, L, D]``.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
