"""Inputs of a network beside the noisy sample and its time: rows of tensors, one for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Conditioning:
    """Inputs of the network besides ``x_t`` and ``t``: tensors whose first dimension is the prompt.

    Args:
        tensors: name -> ``[B, ...]``; the names belong to the generator that made them.
        negative: text of the negative prompt, one row, by the same weights; None if the generator keeps it.
    """

    tensors: dict[str, Tensor]
    negative: Conditioning | None = None

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, rows: Tensor) -> Conditioning:
        """Rows by index ``[M]``; an index may repeat, as it does for the samples of one group."""
        return replace(self, tensors={name: value[rows] for name, value in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """One conditioning holding the rows of all ``parts`` in order.

        Texts of unequal length ``[B, L, ...]`` are padded with zeros; a model that needs a mask stores it beside them.
        """
        return replace(
            parts[0], tensors={name: _cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )


@dataclass(frozen=True)
class Call:
    """Inputs of a network call beside the latents: times ``t [N]`` in [0, 1] and N rows of conditioning."""

    t: Tensor
    cond: Conditioning


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of all ``tensors``, zeros appended along dimension 1 if it is shorter than the longest."""
    longest = max((x.shape[1] for x in tensors if x.ndim > 1), default=0)
    return torch.cat(
        [F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) if x.ndim > 1 else x for x in tensors]
    )
