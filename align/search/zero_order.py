"""Zero-order search: a step to the best neighbour of a noise, again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method

if TYPE_CHECKING:
    from align.search.task import Task


class ZeroOrder(Method):
    """Zero-order search: neighbours of a noise at a fixed angle, the best becomes the next centre (arXiv 2501.09732)

    Neighbours have exactly the length of the noise they surround. Where none is better, a new noise is begun.
    """

    kind: Literal["zero_order"] = Field("zero_order", description="local search over noise")
    neighbours: int = Field(4, ge=1, description="samples of a round")
    cosine: float = Field(0.95, gt=-1, lt=1, description="of the angle between a noise and its neighbours")
    restart: bool = Field(True, description="begin anew where no neighbour is better; else stay")

    def search(self, task: Task) -> None:
        """Round after round; the noise itself is the first sample of its first round."""
        import torch

        from align.search.noises import neighbour
        from align.search.rows import best

        centre, _, _, names = task.begin(1)
        height = torch.full((task.prompts,), -torch.inf, dtype=torch.float64)
        fresh = torch.ones(task.prompts, dtype=torch.bool)
        for number, count in task.rounds(task.plain, self.neighbours):
            row = task.rows(count)
            tried = neighbour(centre[row], task.noise(row, "neighbour", number), self.cosine)
            lineage = [(*names[b], f"round {number}: neighbour {n % count}") for n, b in enumerate(row.tolist())]
            for b in fresh.nonzero().flatten().tolist():
                tried[b * count], lineage[b * count] = centre[b], names[b]
            values = task.score(task.sample(tried, row, "sample", number), row, lineage)
            top = best(values, task.prompts)
            better = values[top].nan_to_num(-torch.inf) > height
            moved = better.to(centre.device)
            centre = torch.where(moved.view(-1, *[1] * (centre.ndim - 1)), tried[top.to(centre.device)], centre)
            names = [lineage[n] if up else name for n, up, name in zip(top.tolist(), better, names, strict=True)]
            height = torch.where(better, values[top], height)
            fresh = ~better if self.restart else torch.zeros_like(better)
            if bool(fresh.any()):
                begun, where = task.noise(task.rows(1), "restart", number), fresh.to(centre.device)
                centre = torch.where(where.view(-1, *[1] * (centre.ndim - 1)), begun, centre)
                names = [
                    (f"noise after round {number}",) if new else name for new, name in zip(fresh, names, strict=True)
                ]
                height = height.masked_fill(fresh, -torch.inf)
