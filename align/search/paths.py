"""Search over paths: go some way, add noise to several copies, go on, keep the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method

if TYPE_CHECKING:
    from align.search.budget import Cost
    from align.search.task import Task


class Paths(Method):
    """Search over paths: copies of a path are noised back, taken further, and judged (arXiv 2501.09732)

    Works with any sampler, deterministic ones too, because the copies differ by the noise they are given.
    """

    kind: Literal["paths"] = Field("paths", description="search over paths")
    paths: int = Field(2, ge=1, description="kept per prompt at every stage")
    copies: int = Field(4, ge=2, description="of every path at every stage")
    start: float = Field(0.3, ge=0, lt=1, description="share of the steps before the first stage")
    back: int = Field(1, ge=1, description="steps a copy is noised back by")
    forward: int = Field(3, ge=2, description="steps it is then taken; more than back")

    def search(self, task: Task) -> None:
        """One set of paths after another while the budget lasts."""
        stages = self.stages(task.steps)
        for number, count in task.rounds(self.cost(task, stages), self.paths):
            self.follow(task, stages, number, count)

    def stages(self, steps: int) -> list[tuple[int, int, int]]:
        """(step reached, step noised back to, step then taken to) of every stage; the last ends with the sample."""
        here, found = min(max(round(self.start * steps), 1), steps - 1), []
        while here < steps:
            low = max(here - self.back, 0)
            there = min(max(low + self.forward, here + 1), steps)
            found.append((here, low, there))
            here = there
        return found or [(0, 0, steps)]

    def cost(self, task: Task, stages: list[tuple[int, int, int]]) -> Cost:
        """Of one path."""
        from align.search.budget import Cost, together

        parts = [(Cost((there - low) * task.calls), self.copies) for _, low, there in stages]
        judged = [(task.glance, self.copies * (len(stages) - 1)), (Cost(0, 1, 1), self.copies)]
        return together(Cost(stages[0][0] * task.calls), *parts, *judged)

    def follow(self, task: Task, stages: list[tuple[int, int, int]], number: int, count: int) -> None:
        """From noise to scored samples with ``count`` paths per prompt."""
        import torch

        from align.search.noises import add_noise

        x, row, _, lineage = task.begin(count)
        x = task.sample(x, row, "path", number, last=stages[0][0])
        wide = task.rows(count * self.copies)
        at: tuple[int, torch.Tensor, torch.Tensor] = (0, x, x)

        def remember(i: int, x: torch.Tensor, v: torch.Tensor) -> None:
            nonlocal at
            at = (i, x, v)

        for here, low, there in stages:
            noise = task.noise(wide, "copy", number, here)
            t, t_back = float(task.times[here]), float(task.times[low])
            copies = x.repeat_interleave(self.copies, 0)
            copies = noise if low == 0 else add_noise(copies, noise, t, t_back)
            lineage = [(*line, f"step {here}: copy {k}") for line in lineage for k in range(self.copies)]
            x = task.sample(copies, wide, "path", number, here, first=low, last=there, on_step=remember)
            if there == task.steps:
                task.score(x, wide, lineage)
                return
            i, before, v = at
            table = task.value(before, v, task.times[i], wide).nan_to_num(nan=-torch.inf).view(task.prompts, -1)
            chosen = table.sort(dim=1, descending=True, stable=True).indices[:, :count]
            kept = (chosen + table.shape[1] * torch.arange(task.prompts)[:, None]).flatten()
            x, lineage = x[kept.to(x.device)], [lineage[n] for n in kept.tolist()]
