"""Best-of-N: the best of independent samples. The baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.search.base import Method

if TYPE_CHECKING:
    from align.search.task import Task


class BestOfN(Method):
    """Best of N independent samples: random search (arXiv 2501.09732)"""

    kind: Literal["best_of_n"] = Field("best_of_n", description="random search")
    n: int | None = Field(None, ge=1, description="samples per prompt; null = as many as the budget allows")

    def search(self, task: Task) -> None:
        """Sample and score. Samples do not depend on each other, and the first is the plain sample."""
        made, at_once = 0, max(1, task.chunk // task.prompts)
        for _, fits in task.rounds(task.cost.sample, at_once):
            count = fits if self.n is None else min(fits, self.n - made)
            if count < 1:
                return
            task.score(task.sample(task.begin(count), "sample"), alone=True)
            made += count
