"""Rows of particles: in slices, by prompt, without what is not finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``count`` rows."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def places(row: Tensor) -> list[int]:
    """``[N]`` place of every particle among its prompt's."""
    seen: dict[int, int] = {}
    out = []
    for b in row.tolist():
        out.append(seen.get(b, 0))
        seen[b] = out[-1] + 1
    return out


def best(values: Tensor, prompts: int) -> Tensor:
    """Row of the highest value of each prompt, ``[B]``, the first of equals; missing ones never, unless all are."""
    table = values.nan_to_num(nan=-torch.inf).view(prompts, -1)
    return table.argmax(1) + torch.arange(prompts) * table.shape[1]


def finite(values: Tensor) -> Tensor:
    """On the CPU in float64, NaN for whatever is not finite."""
    values = values.detach().to("cpu", torch.float64)
    return torch.where(values.isfinite(), values, torch.nan)
