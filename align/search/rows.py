"""Rows of particles: in slices, by prompt, without non-finite values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


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


def by_prompt(values: Tensor, prompts: int) -> Tensor:
    """``[N]`` -> ``[B, N / B]``, minus infinity where missing."""
    return values.nan_to_num(nan=-torch.inf).view(prompts, -1)


def rows_of(chosen: Tensor, each: int) -> Tensor:
    """Rows ``[B * K]`` of the places ``chosen [B, K]`` among each prompt's ``each`` particles."""
    return (chosen + each * torch.arange(len(chosen))[:, None]).flatten()


def top(values: Tensor, prompts: int, count: int) -> Tensor:
    """Rows ``[B * count]`` of the highest values of each prompt, best first, the first of equals, missing ones last.

    Args:
        values: ``[N]`` on the CPU, equally many for every prompt.
    """
    table = by_prompt(values, prompts)
    return rows_of(table.sort(dim=1, descending=True, stable=True).indices[:, :count], table.shape[1])


def finite(values: Tensor) -> Tensor:
    """On the CPU in float64, NaN for whatever is not finite."""
    values = values.detach().to("cpu", torch.float64)
    return torch.where(values.isfinite(), values, torch.nan)
