"""Zero-order search: repeated steps to the best neighbour of a noise."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method
from align.search.noises import neighbour
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.particles import Particles
    from align.search.task import Task
else:
    torch = lazy("torch")


class ZeroOrder(Method):
    """Zero-order search: neighbours of a noise at a fixed angle; the best becomes the next centre (arXiv 2501.09732)

    Neighbours have exactly the length of the noise they surround. Where none is better, a new noise is begun.
    """

    kind: Literal["zero_order"] = Field("zero_order", description="local search over noise")
    neighbours: int = Field(4, ge=1, description="samples per round")
    cosine: float = Field(0.95, gt=-1, lt=1, description="cosine of the angle between a noise and its neighbours")
    restart: bool = Field(
        True, description="start again from a new noise if no neighbour is better; false = keep the centre"
    )

    def search(self, task: Task) -> None:
        """Round after round; the noise itself is the first sample of its first round."""
        unscored = torch.full((task.prompts,), -torch.inf, dtype=torch.float64)
        centre = task.begin(1).valued(unscored)
        fresh = torch.ones(task.prompts, dtype=torch.bool)
        for trial, count in task.rounds(task.cost.sample, self.neighbours):
            tried = self.around(task, centre, fresh, trial, count)
            tried = tried.valued(task.score(task.sample(tried, "sample", trial)))
            best = tried.best(task.prompts)
            better = best.value > centre.value
            centre = best.where(better, centre)
            fresh = ~better & self.restart
            if bool(fresh.any()):
                begun = centre.numbered()
                begun = replace(begun, lineage=((f"noise after round {trial}",),) * task.prompts)
                begun = begun.moved(task.noise(begun, "restart", trial)).valued(unscored)
                centre = begun.where(fresh, centre)

    def around(self, task: Task, centre: Particles, fresh: Tensor, trial: int, count: int) -> Particles:
        """``count`` neighbours of each centre ``[B]``; the first is the centre itself where that is ``fresh [B]``."""
        copies = centre.repeat(count)
        moved = copies.moved(neighbour(copies.x, task.noise(copies, "neighbour", trial), self.cosine))
        itself = fresh.repeat_interleave(count) & (copies.number == 0)
        return copies.moved(copies.x).where(itself, moved.named(f"round {trial}: neighbour", moved.number))
