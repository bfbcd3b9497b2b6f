"""SVDD: at every step the best of many children continues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.methods.beam import Beam
from align.search.rows import by_prompt, rows_of
from align.search.smc import weights
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.task import Task
else:
    torch = lazy("torch")


class SVDD(Beam):
    """SVDD: soft value-based decoding, one of M children chosen by the value of its x0_hat (arXiv 2408.08252)

    Beam search in which no beam is dropped: each is replaced by one of its own children.
    """

    kind: Literal["svdd"] = Field("svdd", description="soft value-based decoding")  # type: ignore[assignment]
    beams: int = Field(1, ge=1, description="independent searches per prompt")
    children: int = Field(
        20, ge=2, description="M, the children sampled at every step; fewer if the budget allows fewer"
    )
    strength: float | None = Field(
        None,
        gt=0,
        description="strength in the probability ~ exp(strength * value) of drawing a child; null = always the "
        "best child",
    )

    def choose(self, task: Task, values: Tensor, count: int, i: int, trial: int) -> Tensor:
        """Rows ``[B * count]``, one child of every beam."""
        table = by_prompt(values, task.prompts * count)
        if self.strength is None:
            chosen = table.argmax(1, keepdim=True)
        else:
            edges = weights(self.strength * table).cumsum(1)
            draws = task.uniform(trial, "choose", i, each=count)
            chosen = torch.searchsorted(edges, draws[:, None]).clamp_max(self.children - 1)
        return rows_of(chosen, self.children)
