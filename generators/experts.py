"""Two networks that split the time axis, as one network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Sends every row to the expert of its time: ``transformer`` at and above the boundary, ``transformer_2`` below.

    Args:
        boundary: flow time in [0, 1].

    Attributes:
        both: every call runs both experts, the one without rows on one row whose result counts nothing: processes that
            hold parts of their weights must call them equally often.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary
        self.both = False

    def forward(self, t: Tensor, **rows: Tensor | None) -> tuple[Tensor]:
        """Outputs of the experts for ``rows``, each ``[N, ...]`` or None, at times ``t [N]``."""
        high = t >= self.boundary
        parts: list[Tensor] = []
        places: list[Tensor] = []
        idle: Any = 0
        for network, chosen in ((self.transformer, high), (self.transformer_2, ~high)):
            if chosen.any():
                place = chosen.nonzero().flatten()
                mine = {name: None if value is None else value[place] for name, value in rows.items()}
                parts.append(network(**mine, return_dict=False)[0])
                places.append(place)
            elif self.both:
                one = {name: None if value is None else value[:1] for name, value in rows.items()}
                idle = idle + 0 * network(**one, return_dict=False)[0].sum()
            elif torch.is_grad_enabled():  # processes that average gradients wait for those of every parameter
                idle = idle + 0 * sum(value.flatten()[0] for value in network.parameters() if value.requires_grad)
        return (torch.cat(parts)[torch.cat(places).argsort()] + idle,)
