"""Distance of a sample from a trained reward's training features: PrefPaint's measure of trust."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Form = Literal["quadratic", "product"]
"""Norm of features; see :func:`distance`."""


def gram(features: Tensor) -> Tensor:
    """``sum_n z_n z_n^T`` of features ``[n, D]``: ``[D, D]`` float64 on the CPU."""
    rows = features.detach().cpu().double()
    return rows.T @ rows


def distance(features: Tensor, inverse: Tensor, form: Form = "quadratic") -> Tensor:
    """Distance ``[N]`` from the training features, float32 on the CPU.

    Args:
        features: ``[N, D]``.
        inverse: ``[D, D]`` V^-1, where V is the sum of :func:`gram` and a ridge.
        form: quadratic = ``sqrt(z V^-1 z)``, which bounds the error of a linear head | product = ``|z V^-1|``, as in
            PrefPaint's code.
    """
    rows = features.detach().cpu().double()
    moved = rows @ inverse
    squares = (moved * rows if form == "quadratic" else moved.square()).sum(1)
    return squares.clamp_min(0).sqrt().float()


def inverse_of(gram: Tensor, ridge: float) -> Tensor:
    """``(ridge I + gram)^-1``, ``[D, D]`` float64, for a ridge above 0."""
    return torch.linalg.inv(gram.double() + ridge * torch.eye(len(gram), dtype=torch.float64))
