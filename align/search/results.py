"""Results of a search: the best sample of a prompt, its origin and its cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Candidate:
    """A finished sample.

    Args:
        reward: NaN if it has none.
        latents: ``[...]`` of one sample, on the CPU.
        media: ``[3, H, W]`` or ``[F, 3, H, W]`` in [0, 1], on the CPU.
        lineage: how it came about, first things first.
        number: which of its prompt's finished samples it is, from 0.
        log_weight: of a particle of a sampler that weighs them; NaN elsewhere.
    """

    reward: float
    latents: Tensor
    media: Tensor
    lineage: tuple[str, ...]
    number: int
    log_weight: float = math.nan


@dataclass
class Found:
    """The result for one prompt.

    Args:
        prompt: its text; ``number`` its place among all prompts.
        kept: the best candidates, best first, then the worst if it is another; none where no sample has a score.
        rewards: of every finished sample in order, NaN where missing.
        curve: best reward so far against each cost, a row wherever it rose and one at the end.
        spent: what the search cost, with ``seconds``.
        reason: why a score is missing, of the first that is.
    """

    prompt: str
    number: int
    kept: list[Candidate] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def best(self) -> Candidate | None:
        """The candidate with the highest reward; the first of equals."""
        return self.kept[0] if self.kept else None

    @property
    def reward(self) -> float:
        """Reward of the best sample; NaN if there is none."""
        return self.kept[0].reward if self.kept else math.nan

    def offer(self, candidate: Candidate, spent: dict[str, float], keep: int) -> None:
        """Take note of a finished sample, in order; ``spent`` is what the prompt has cost with it."""
        self.rewards.append(candidate.reward)
        if not math.isfinite(candidate.reward):
            return
        if not candidate.reward <= self.reward:
            self.curve.append({**spent, "reward": candidate.reward})
        ranked = sorted([*self.kept, candidate], key=lambda one: (-one.reward, one.number))
        self.kept = [*ranked[:keep], *([ranked[-1]] if len(ranked) > keep else [])]

    def close(self, spent: dict[str, float]) -> None:
        """The search is over."""
        self.spent = spent
        if self.kept:
            self.curve.append({**spent, "reward": self.reward})

    def row(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON holds it."""
        return {
            "prompt": self.prompt,
            "number": self.number,
            "reward": self.reward,
            "lineage": list(self.best.lineage) if self.best else [],
            "kept": [{"reward": c.reward, "number": c.number, "lineage": list(c.lineage)} for c in self.kept],
            "rewards": self.rewards,
            "curve": self.curve,
            "spent": self.spent,
            "reason": self.reason,
        }


def between(before: dict[str, float], after: dict[str, float], share: float) -> dict[str, float]:
    """Costs at a share in [0, 1] of the way from ``before`` to ``after``; what is counted is whole."""
    now = {name: before[name] + (after[name] - before[name]) * share for name in after}
    return {name: value if name == "seconds" else round(value) for name, value in now.items()}
