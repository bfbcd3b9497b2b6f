"""Hierarchical progressive query attention: learned queries that read several layers of a language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewards.base import RewardError

HEADS = 8


class QueryReader(nn.Module):
    """SoliReward's attention over layers (arXiv 2512.22170), without its score.

    A learned query reads the first of K layers, what it found there is the query to the next, and so on, without
    residuals. A second query reads the last layer. The answers are added.

    Raises:
        RewardError: the width is not a multiple of 8, the number of attention heads.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        if width % HEADS:
            raise RewardError(f"attention over layers has {HEADS} heads; the model's hidden size {width} needs another")
        self.first, self.last = nn.Parameter(torch.zeros(1, width)), nn.Parameter(torch.zeros(1, width))
        self.chain = nn.ModuleList(self._attention(width) for _ in range(layers))
        self.end = self._attention(width)

    @staticmethod
    def _attention(width: int) -> nn.MultiheadAttention:
        return nn.MultiheadAttention(width, HEADS, batch_first=True)

    def read(self, states: Sequence[Tensor], final: Tensor, real: Tensor) -> Tensor:
        """K of ``[b, L, D]`` and the last layer's, of which ``real [b, L]`` are tokens -> ``[b, D]``."""
        padding = ~real
        query = self.first.expand(len(final), 1, -1)
        for attention, state in zip(self.chain, states, strict=True):
            query = attention(query, state, state, padding, need_weights=False)[0]
        last = self.last.expand(len(final), 1, -1)
        answer = self.end(last, final, final, padding, need_weights=False)[0]
        return (query + answer)[:, 0]


class QueryAttention(QueryReader):
    """The whole head of SoliReward: a SiLU network of two layers scores what :class:`QueryReader` reads."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__(width, layers)
        self.score = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1, bias=False))

    def forward(self, states: Sequence[Tensor], final: Tensor, real: Tensor) -> Tensor:
        """Arguments of :meth:`QueryReader.read` -> ``[b]``."""
        return self.score(self.read(states, final, real))[:, 0]


def chosen_layers(layers: Sequence[int] | None, reads: int, depth: int) -> tuple[int, ...]:
    """The layers ``1 .. depth`` that a head of ``reads`` layers reads: those given, or as published.

    >>> chosen_layers(None, 4, 24), chosen_layers(None, 4, 28), chosen_layers(None, 6, 48)
    ((6, 12, 18, 24), (7, 14, 21, 28), (8, 16, 24, 32, 40, 48))

    Raises:
        RewardError: another number of layers than the weights have, or layers that are not there.
    """
    found = tuple(layers) if layers else tuple(depth * (i + 1) // reads for i in range(reads))
    if len(found) != reads or not all(1 <= layer <= depth for layer in found):
        raise RewardError(f"layers {list(found)} should be {reads} of 1 to {depth}, as many as the weights have")
    return found
