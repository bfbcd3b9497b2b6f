"""Trust-region noise search: boxes around the best noises that grow with success and shrink with failure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from align.search.task import Task


class TrustRegion(Method):
    """Trust-region noise search: black-box boxes around the best noises, as TuRBO does

    A region's samples differ from its centre in a random part of the coordinates, by up to half the box's length, and
    are as long as the centre. Of its length only the start, limits and rule of change are published.
    """

    kind: Literal["trust_region"] = Field("trust_region", description="trust regions in noise space")
    regions: int = Field(15, ge=1, description="boxes, around the best noises of the warm-up")
    batch: int = Field(20, ge=1, description="samples of an iteration, the regions in turn")
    warmup: float = Field(0.2, gt=0, lt=1, description="share of the budget that goes into independent samples first")
    length: float = Field(0.8, gt=0, description="of a box at first, per coordinate of standard normal noise")
    limits: tuple[float, float] = Field((0.05, 2.4), description="[shortest, longest] box; a shorter one begins anew")
    factor: float = Field(1.5, gt=1, description="by which boxes grow and shrink")
    tolerance: int = Field(3, ge=1, description="successes or failures in a row before that")
    coordinates: tuple[float, float] = Field((0.1, 0.9), description="[least, most] share of coordinates that change")

    def search(self, task: Task) -> None:
        """Warm up, then iterate."""
        import torch

        from align.search.rows import best

        total = task.meter.affordable(task.plain, 2**20)
        centre, value, names = self.warm_up(task, max(1, min(round(self.warmup * total), total - 1)))
        regions = value.shape[1]
        length, wins, losses = (torch.full_like(value, start) for start in (self.length, 0.0, 0.0))
        turn = 0
        for number, count in task.rounds(task.plain, self.batch):
            region = (turn + torch.arange(count)) % regions
            turn += count
            row = task.rows(count)
            which = row.cpu() * regions + region.repeat(task.prompts)
            tried = self.near(task, centre[which.to(centre.device)], length.flatten()[which], row, number)
            lineage = [(*names[w], f"iteration {number}: sample {n % count}") for n, w in enumerate(which.tolist())]
            found = task.score(task.sample(tried, row, "sample", number), row, lineage)
            for r in region.unique().tolist():  # the best of each region's samples decides
                mine = (region == r).nonzero().flatten()
                table = found.view(task.prompts, count)[:, mine]
                top = best(table.flatten(), task.prompts) % len(mine)
                source = torch.arange(task.prompts) * count + mine[top]
                up = found[source].nan_to_num(-torch.inf) > value[:, r]
                for b in up.nonzero().flatten().tolist():
                    slot, n = b * regions + r, int(source[b])
                    centre[slot], names[slot], value[b, r] = tried[n], lineage[n], found[n]
                wins[:, r], losses[:, r] = torch.where(up, wins[:, r] + 1, 0), torch.where(up, 0, losses[:, r] + 1)
            self.resize(length, wins, losses)

    def warm_up(self, task: Task, count: int) -> tuple[Tensor, Tensor, list[tuple[str, ...]]]:
        """Centres ``[B * R, ...]``, their values ``[B, R]`` and names: the best of ``count`` noises."""
        import torch

        parts: list[tuple[Tensor, Tensor, list[tuple[str, ...]]]] = []
        made = 0
        for _, fits in task.rounds(task.plain, max(1, task.chunk // task.prompts)):
            more = min(fits, count - made)
            if more < 1:
                break
            x, row, number, lineage = task.begin(more)
            found = task.score(task.sample(x, row, "sample", number=number), row, lineage, alone=True)
            parts.append((x.unflatten(0, (task.prompts, more)), found.view(task.prompts, more), lineage))
            made += more
        x, values = torch.cat([x for x, _, _ in parts], 1), torch.cat([found for _, found, _ in parts], 1)
        table = [[name for _, found, line in parts for name in line[: found.shape[1]]]] * task.prompts
        order = values.nan_to_num(nan=-torch.inf).sort(dim=1, descending=True, stable=True).indices[:, : self.regions]
        chosen = torch.stack([x[b][order[b].to(x.device)] for b in range(task.prompts)])
        names = [table[b][n] for b in range(task.prompts) for n in order[b].tolist()]
        return chosen.flatten(0, 1), values.gather(1, order).nan_to_num(nan=-torch.inf), names

    def near(self, task: Task, centre: Tensor, length: Tensor, row: Tensor, number: int) -> Tensor:
        """A point in the box around each centre ``[N, ...]``, as long as the centre."""
        import torch

        from align.losses import column
        from align.search.noises import as_long_as

        def uniform(what: str) -> Tensor:
            return torch.special.ndtr(task.noise(row, what, number))

        least, most = self.coordinates
        share = least + (most - least) * torch.special.ndtr(task.noise(row, "share", number).flatten(1)[:, 0])
        moved = uniform("which") < column(share, centre)
        offset = (uniform("where") - 0.5) * column(length, centre)
        return as_long_as(torch.where(moved, centre + offset, centre), centre)

    def resize(self, length: Tensor, wins: Tensor, losses: Tensor) -> None:
        """Grow and shrink the boxes in place; one too short begins anew."""
        grow, shrink = wins >= self.tolerance, losses >= self.tolerance
        length[grow] = (length[grow] * self.factor).clamp_max(self.limits[1])
        length[shrink] = length[shrink] / self.factor
        length[length < self.limits[0]] = self.length
        wins[grow], losses[shrink] = 0, 0
