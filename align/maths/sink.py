"""Cache of a causal video model's attention: a recent window, and an average of older entries (EMA-Sink, 2512.04678).

No generator here is causal, so no rollout uses it yet. It is what a chunk-by-chunk student keeps between its chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")


def ema(sink: Tensor, evicted: Tensor, alpha: float) -> Tensor:
    """``alpha sink + (1 - alpha) evicted``, for keys and values alike: tokens ``[..., S, D]`` of one chunk."""
    return alpha * sink + (1 - alpha) * evicted


@dataclass(frozen=True)
class EMASink:
    """Keys and values ``[..., n, D]`` of the tokens that the next chunk attends to, oldest first.

    Args:
        keys: of the sink's S tokens, where there are any, and then of the window's; ``values`` likewise.
        chunk: tokens per chunk, S.
        window: chunks in the window, at least 1.
        alpha: how much of the sink is kept when a chunk leaves the window; published 0.999, and 9 frames of 3 a chunk.
        chunks: how many chunks were added.
    """

    keys: Tensor
    values: Tensor
    chunk: int
    window: int = 3
    alpha: float = 0.999
    chunks: int = 0

    @classmethod
    def empty(cls, like: Tensor, chunk: int, window: int = 3, alpha: float = 0.999) -> EMASink:
        """Without tokens, of the shape and dtype of ``like [..., n, D]``."""
        if chunk < 1 or window < 1 or not 0 <= alpha <= 1:
            raise ValueError(f"a sink needs chunk and window >= 1, alpha in [0, 1]; given {chunk}, {window}, {alpha}")
        none = like[..., :0, :]
        return cls(none, none, chunk, window, alpha)

    def add(self, keys: Tensor, values: Tensor) -> EMASink:
        """The cache after a chunk ``[..., S, D]``. The first chunk that leaves the window becomes the sink.

        Raises:
            ValueError: not one chunk.
        """
        if keys.shape[-2] != self.chunk or values.shape[-2] != self.chunk:
            raise ValueError(f"a chunk has {self.chunk} tokens, given {keys.shape[-2]} keys, {values.shape[-2]} values")
        keys, values = self._kept(self.keys, keys), self._kept(self.values, values)
        return EMASink(keys, values, self.chunk, self.window, self.alpha, self.chunks + 1)

    def _kept(self, old: Tensor, new: Tensor) -> Tensor:
        if self.chunks <= self.window:  # the window has room, or the chunk that leaves it is the sink
            return torch.cat([old, new], -2)
        size = self.chunk
        sink = ema(old[..., :size, :], old[..., size : 2 * size, :], self.alpha)
        return torch.cat([sink, old[..., 2 * size :, :], new], -2)

    def attend(self, queries: Tensor) -> Tensor:
        """Attention of the newest chunk's queries ``[..., S, D]`` to all that is kept, its own tokens included."""
        return F.scaled_dot_product_attention(queries, self.keys, self.values)
