"""SVDD: at every step the best of many children goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.beam import Beam

if TYPE_CHECKING:
    from torch import Tensor

    from align.search.task import Task


class SVDD(Beam):
    """SVDD: soft value-based decoding, one of M children by the value of its x0_hat (arXiv 2408.08252)

    Beam search in which no beam is dropped: each is replaced by one of its own children.
    """

    kind: Literal["svdd"] = Field("svdd", description="soft value-based decoding")  # type: ignore[assignment]
    beams: int = Field(1, ge=1, description="independent searches per prompt")
    children: int = Field(20, ge=2, description="M, drawn at every step; fewer if the budget pays for fewer")
    strength: float | None = Field(
        None, gt=0, description="a child is drawn with probability ~ exp(strength * value); null = the best is taken"
    )

    def choose(self, task: Task, values: Tensor, count: int, i: int, number: int) -> Tensor:
        """Rows ``[B * count]``, one child of every beam."""
        import torch

        table = values.nan_to_num(nan=-torch.inf).view(-1, self.children)
        if self.strength is None:
            chosen = table.argmax(1)
        else:
            from align.search.particles import weights

            draws = [task.uniform(number, "choose", i, beam) for beam in range(count)]
            edges = weights(self.strength * table).cumsum(1)
            chosen = torch.searchsorted(edges, torch.stack(draws, 1).flatten()[:, None]).flatten()
            chosen = chosen.clamp_max(self.children - 1)
        return chosen + self.children * torch.arange(len(table))
