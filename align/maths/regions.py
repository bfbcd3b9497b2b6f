"""Regions of images as weights of latents: masks, and maps of local scores (SRUM)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.maths import losses
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")


def at_latents(region: Tensor, like: Tensor) -> Tensor:
    """A map ``[M, 1, H, W]`` at the size of latents ``[M, C, h, w]`` or ``[M, C, F, h, w]``: ``[M, 1, (1,) h, w]``.

    Every value is the mean of the pixels that a latent stands for, so constant maps stay as they are.

    Raises:
        ValueError: latents of another shape, which have no places.
    """
    if like.ndim not in (4, 5):
        raise ValueError(f"latents {tuple(like.shape)} have no height and width")
    small = F.interpolate(region.float(), size=like.shape[-2:], mode="area").to(like.device)
    return small if like.ndim == 4 else small[:, :, None]


def reward_map(regions: Tensor, score: Tensor, *, signed: bool = False) -> Tensor:
    """SRUM's weights (arXiv 2510.12784) of local scores in [-1, 1] and a score of the whole image::

        signed      (score + 1) / 2 * s
        otherwise   (score + 1) / 2 * max(1/2, (s + 1) / 2)         the authors' code

    Outside all regions s is 0, which gives 1/2 in the second form. The value in the first is not known; 0 is ours.

    Args:
        regions: ``[M, 1, H, W]`` local scores, NaN outside all regions.
        score: ``[M]`` in [-1, 1].

    Returns:
        ``[M, 1, H, W]``; in [0, 1] unless signed, and in [-1, 1] if signed.
    """
    local = regions.nan_to_num(0.0)
    local = local if signed else ((local + 1) / 2).clamp_min(0.5)
    return (score.to(local).reshape(-1, 1, 1, 1) + 1) / 2 * local


def region_fm(v: Tensor, x0: Tensor, eps: Tensor, weight: Tensor, constraint: float) -> losses.Loss:
    """Flow matching weighted place by place, and a constraint that is not::

        mean (weight (v - u)^2) + constraint mean (v - u)^2,    u = eps - x0

    Args:
        v: ``[M, ...]``, with gradient.
        weight: of a shape that broadcasts to ``v``, see :func:`reward_map`; where it is negative, the error grows.
        constraint: weight of the plain error.

    Returns:
        metric ``fm``, the plain error, and ``weight``, the mean of the weights.
    """
    square = (losses.precise(v) - losses.precise(eps - x0)).square()
    weight = weight.detach().to(square).expand_as(square)
    plain = square.flatten(1).mean(1)
    value = (weight * square).flatten(1).mean(1) + constraint * plain
    return losses.Loss(value, {"fm": plain.detach(), "weight": weight.flatten(1).mean(1)})
