"""Diversity of samples, accumulated over chunks and processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from align.runs.processes import Processes

PIECE = 2**22
"""Numbers added up over the processes at a time."""


class Spread:
    """Root of the mean unbiased pixel variance of all samples that were added, however they were divided."""

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.total: Tensor | None = None

    def add(self, media: Tensor) -> None:
        """Count N samples ``[N, ...]`` in [0, 1], all of one shape."""
        for sample in media.detach().cpu():
            centred = sample.double() - 0.5
            self.total = centred if self.total is None else self.total.add_(centred)
            self.squares += float(centred.square().sum())
        self.count += len(media)

    def value(self, processes: Processes | None = None) -> float:
        """The spread, 0 for fewer than two samples.

        Args:
            processes: whose samples are counted together; every one of them asks for the value.
        """
        total, count, squares = self.total, self.count, self.squares
        if processes is not None and processes.share.world > 1:
            everyone = processes.objects([(None if total is None else tuple(total.shape), count, squares)])
            count, squares = sum(one[1] for one in everyone), sum(one[2] for one in everyone)
            shape = next((one[0] for one in everyone if one[0] is not None), (0,))
            total = torch.zeros(shape, dtype=torch.float64) if total is None else total
            total = torch.cat([processes.add(piece) for piece in total.flatten().split(PIECE)])
        if total is None or count < 2:
            return 0.0
        mean_square = float(total.square().sum()) / count
        return max((squares - mean_square) / (count - 1) / total.numel(), 0.0) ** 0.5
