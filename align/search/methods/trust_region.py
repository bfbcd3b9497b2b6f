"""Trust-region noise search: boxes around the best noises that grow on success and shrink on failure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.maths.losses import column
from align.search.base import Method
from align.search.noises import as_long_as
from align.search.particles import Particles, cat
from align.search.rows import rows_of
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.task import Task
else:
    torch = lazy("torch")


class TrustRegion(Method):
    """Trust-region noise search: black-box search in boxes around the best noises, as in TuRBO

    A region's samples differ from its centre in a random part of the coordinates, by up to half the box's length, and
    are as long as the centre. Of its length only the start, limits and rule of change are published.
    """

    kind: Literal["trust_region"] = Field("trust_region", description="trust regions in noise space")
    regions: int = Field(15, ge=1, description="number of boxes, around the best noises of the warm-up")
    batch: int = Field(20, ge=1, description="samples per iteration, shared by the regions in turn")
    warmup: float = Field(0.2, gt=0, lt=1, description="share of the budget spent on independent samples first")
    length: float = Field(0.8, gt=0, description="initial box length, per coordinate of standard normal noise")
    limits: tuple[float, float] = Field(
        (0.05, 2.4), description="[shortest, longest] box length; a shorter box is reset to the initial length"
    )
    factor: float = Field(1.5, gt=1, description="factor by which a box grows or shrinks")
    tolerance: int = Field(3, ge=1, description="consecutive successes or failures before a box grows or shrinks")
    coordinates: tuple[float, float] = Field(
        (0.1, 0.9), description="[least, most] share of the coordinates that change"
    )

    def search(self, task: Task) -> None:
        """Warm up, then iterate."""
        total = task.meter.affordable(task.cost.sample, 2**20)
        centres = self.warm_up(task, max(1, min(round(self.warmup * total), total - 1)))
        shape, turn = (task.prompts, len(centres) // task.prompts), 0
        length, wins, losses = (torch.full(shape, start, dtype=torch.float64) for start in (self.length, 0.0, 0.0))
        for iteration, count in task.rounds(task.cost.sample, self.batch):
            region = (turn + torch.arange(count)) % shape[1]
            turn += count
            which = rows_of(region.expand(task.prompts, -1), shape[1])
            tried = self.near(task, centres[which].numbered(), length.flatten()[which], iteration)
            tried = tried.valued(task.score(task.sample(tried, "sample", iteration)))
            for r in region.unique().tolist():  # the best of each region's samples decides
                mine = (region == r).nonzero().flatten()
                best = tried[rows_of(mine.expand(task.prompts, -1), count)].best(task.prompts)
                slots = rows_of(torch.full((task.prompts, 1), r), shape[1])
                better = best.value > centres.value[slots]
                centres = centres.put(slots[better], best[better])
                wins[:, r] = torch.where(better, wins[:, r] + 1, 0)
                losses[:, r] = torch.where(better, 0, losses[:, r] + 1)
            self.resize(length, wins, losses)

    def warm_up(self, task: Task, count: int) -> Particles:
        """The centres ``[B * R, ...]`` with their values: the best of ``count`` noises."""
        parts: list[Particles] = []
        made = 0
        for _, fits in task.rounds(task.cost.sample, max(1, task.chunk // task.prompts)):
            more = min(fits, count - made)
            if more < 1:
                break
            begun = task.begin(more)
            parts.append(begun.valued(task.score(task.sample(begun, "sample"), alone=True)))
            made += more
        best = cat(parts).by_prompt().best(task.prompts, self.regions)
        return best.valued(best.value.nan_to_num(nan=-torch.inf))

    def near(self, task: Task, centre: Particles, length: Tensor, iteration: int) -> Particles:
        """A point in the box around each centre, as long as the centre; ``length [N]`` of the boxes."""
        x, (least, most), uniform = centre.x, self.coordinates, torch.special.ndtr
        share, which, where = (task.noise(centre, what, iteration) for what in ("share", "which", "where"))
        changed = uniform(which) < column(least + (most - least) * uniform(share.flatten(1)[:, 0]), x)
        offset = (uniform(where) - 0.5) * column(length, x)
        near = centre.moved(as_long_as(torch.where(changed, x + offset, x), x))
        return near.named(f"iteration {iteration}: sample", near.number)

    def resize(self, length: Tensor, wins: Tensor, losses: Tensor) -> None:
        """Grow and shrink the boxes in place; one too short begins anew."""
        grow, shrink = wins >= self.tolerance, losses >= self.tolerance
        length[grow] = (length[grow] * self.factor).clamp_max(self.limits[1])
        length[shrink] = length[shrink] / self.factor
        length[length < self.limits[0]] = self.length
        wins[grow], losses[shrink] = 0, 0
