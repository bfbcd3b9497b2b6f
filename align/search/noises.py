"""Noise in many dimensions: neighbours on its shell, its log-density, partial renewal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.maths.losses import column

if TYPE_CHECKING:
    from torch import Tensor


def neighbour(x: Tensor, noise: Tensor, cosine: float) -> Tensor:
    """Points as long as ``x [N, ...]`` at exactly the angle arccos(``cosine``) to it, in the direction of ``noise``."""
    length, flat, other = _norm(x), x.flatten(1).double(), noise.flatten(1).double()
    unit = flat / length[:, None]
    across = other - (other * unit).sum(1, keepdim=True) * unit
    across = across / across.norm(dim=1, keepdim=True)
    turned = length[:, None] * (cosine * unit + (1 - cosine**2) ** 0.5 * across)
    return turned.view_as(x).to(x.dtype)


def as_long_as(x: Tensor, other: Tensor) -> Tensor:
    """``x [N, ...]`` at the length of ``other``."""
    return x * column(_norm(other) / _norm(x), x)


def surprise(x: Tensor) -> Tensor:
    """``|x|^2 / 2 - (d - 1) log |x|`` of each row: minus the log-density of the length of standard normal noise."""
    size = x[0].numel()
    length = x.flatten(1).norm(dim=1)
    return length.square() / 2 - (size - 1) * length.log()


def renew(x: Tensor, eps: Tensor, noise: Tensor, t: Tensor | float, share: float) -> Tensor:
    """``x_t`` with the fraction ``share`` (in amplitude) of its noise renewed; the amount of noise stays.

    Args:
        eps: ``[N, ...]`` the noise that is in ``x``, as the network sees it.
        noise: ``[N, ...]`` standard normal.
    """
    return x + t * (((1 - share**2) ** 0.5 - 1) * eps + share * noise)


def add_noise(x: Tensor, noise: Tensor, t: float, t_back: float) -> Tensor:
    """``x_t`` brought to the later noise level ``t_back >= t`` by the forward process."""
    kept = (1 - t_back) / (1 - t)
    return kept * x + (t_back**2 - (kept * t) ** 2) ** 0.5 * noise


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).double().norm(dim=1)
