"""Particles with weights: sequential Monte Carlo towards ``p(x) exp(strength * reward)``, what FK, DAS and Psi share.

Weights live in the log domain and go on where resampling is skipped. Along any line of ancestors the potentials
multiply to ``exp(strength * reward)`` of the finished sample: the last one is what the others left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from align.losses import column

if TYPE_CHECKING:
    from align.search.task import Task


def weights(log_weights: Tensor) -> Tensor:
    """Normalised weights of ``[B, K]``; equal ones where all are minus infinity."""
    dead = log_weights.isneginf().all(1, keepdim=True)
    return torch.where(dead, 0.0, log_weights).softmax(1)


def effective_size(log_weights: Tensor) -> Tensor:
    """``1 / sum w^2`` of each prompt, ``[B]`` from 1 to K."""
    return 1 / weights(log_weights).square().sum(1)


def systematic(log_weights: Tensor, offset: Tensor) -> Tensor:
    """Ancestors ``[B, K]`` by systematic resampling: particle k has ``K w_k`` descendants, rounded up or down.

    Args:
        log_weights: ``[B, K]``, float64.
        offset: ``[B]`` in [0, 1).
    """
    count = log_weights.shape[1]
    edges = weights(log_weights).cumsum(1)
    points = (torch.arange(count, dtype=edges.dtype) + offset[:, None]) / count
    return torch.searchsorted(edges / edges[:, -1:], points, right=True).clamp_max(count - 1)


@dataclass(frozen=True)
class Plan:
    """What a particle method does differently.

    Args:
        strengths: ``[S + 1]`` strength of the potential before every step; the last is the target's.
        valued: steps before which particles are judged.
        potential: of values r before steps i: ``diff`` = s_i r - s_j r_j since the last, ``max`` = s_i times the
            highest so far, ``sum`` = s_i times the sum so far.
        guided: follow the gradient of the value in the step's noise.
        resample_below: share of K that the effective size must fall below; 1 = always.
        cap: longest root mean square of the gradient's shift, in standard deviations of the step.
    """

    strengths: Sequence[float]
    valued: frozenset[int]
    potential: Literal["diff", "max", "sum"] = "diff"
    guided: bool = False
    resample_below: float = 0.5
    cap: float | None = None


class Cloud:
    """K weighted particles for each of B prompts, on their way.

    Args:
        x: ``[B * K, ...]`` at the first step.
        tilted: whether they were drawn from the law already tilted by their value, not from noise.
    """

    def __init__(self, task: Task, plan: Plan, x: Tensor, lineage: list[tuple[str, ...]], tilted: bool = False) -> None:
        self.task, self.plan, self.x, self.lineage, self.tilted = task, plan, x, lineage, tilted
        self.count = len(x) // task.prompts
        self.row = task.rows(self.count)
        self.log_weight = torch.zeros(len(x), dtype=torch.float64)
        self.paid = torch.zeros(len(x), dtype=torch.float64)
        self.memory = torch.full((len(x),), -torch.inf if plan.potential == "max" else 0.0, dtype=torch.float64)
        self.v = self.slope = torch.empty(0)

    def run(self, *purpose: int | str) -> None:
        """From the first step to scored samples."""
        task = self.task
        for i in range(task.steps):
            if i in self.plan.valued:
                self._judge(i)
                if task.noisy(i):
                    self._resample(i, *purpose)
            else:
                self.v, self.slope = task.velocity(self.x, task.times[i], self.row), torch.empty(0)
            self._step(i, *purpose)
        task.score(self.x, self.row, self.lineage, self._last_weight)

    def _judge(self, i: int) -> None:
        """Velocity, value and potential before step ``i``."""
        task, t = self.task, self.task.times[i]
        if self.plan.guided:
            self.v, value, self.slope = task.look(self.x, t, self.row)
        else:
            self.v = task.velocity(self.x, t, self.row)
            value = task.value(self.x, self.v, t, self.row)
        strength, known = self.plan.strengths[i], value.nan_to_num(0.0)
        if self.plan.potential == "diff":
            paid = strength * known
            gain = paid - self.paid
        else:
            highest = torch.maximum(self.memory, value.nan_to_num(-torch.inf))
            self.memory = highest if self.plan.potential == "max" else self.memory + known
            gain = strength * self.memory
            paid = self.paid + gain
        if i == 0 and self.tilted:
            gain = torch.zeros_like(gain)
        self.log_weight = self.log_weight + self._without_missing(gain, value)
        self.paid = torch.where(value.isnan(), self.paid, paid)

    def _without_missing(self, gain: Tensor, value: Tensor) -> Tensor:
        """A particle without a value is never an ancestor; where none has one, nothing changes."""
        missing = value.isnan().view(-1, self.count)
        none = missing.all(1, keepdim=True).expand_as(missing)
        return torch.where(none, 0.0, torch.where(missing, -torch.inf, gain.view_as(missing))).flatten()

    def _last_weight(self, reward: Tensor) -> Tensor:
        gain = self.plan.strengths[-1] * reward.nan_to_num(0.0) - self.paid
        self.log_weight = self.log_weight + self._without_missing(gain, reward)
        return self.log_weight

    def _resample(self, i: int, *purpose: int | str) -> None:
        """Copies of the heavy in place of the light, for the prompts whose weights have become too unequal.

        Step ``i`` adds noise, so copies do not stay equal.
        """
        table = self.log_weight.view(-1, self.count)
        offset = self.task.uniform(*purpose, "resample", i)
        chosen = systematic(table, offset)
        needed = (effective_size(table) < self.plan.resample_below * self.count) | (self.plan.resample_below >= 1)
        needed &= (table != table[:, :1]).any(1)
        if not bool(needed.any()):
            return
        ancestors = torch.where(needed[:, None], chosen, torch.arange(self.count))
        index = (ancestors + self.count * torch.arange(len(table))[:, None]).flatten()
        self.lineage = [
            (*self.lineage[j], f"step {i}: of particle {j % self.count}")
            if needed[j // self.count]
            else self.lineage[j]
            for j in index.tolist()
        ]
        kept = torch.where(needed[:, None], 0.0, table).flatten()
        self.log_weight, self.paid, self.memory = kept, self.paid[index], self.memory[index]
        there = index.to(self.x.device)
        self.x, self.v = self.x[there], self.v[there]
        self.slope = self.slope[there] if len(self.slope) else self.slope

    def _step(self, i: int, *purpose: int | str) -> None:
        taken = self.task.step(self.x, self.v, i, self.row, *purpose)
        self.x = taken.x
        if not (self.plan.guided and len(self.slope) and self.task.noisy(i)):
            return
        shift = self.plan.strengths[i + 1] * column(taken.std, self.x) * self.slope  # in standard deviations
        if self.plan.cap is not None:
            size = shift.flatten(1).square().mean(1).sqrt()
            shift = shift * column((self.plan.cap / size).clamp_max(1.0), shift)
        width = column(torch.where(taken.std > 0, taken.std, 1.0), self.x)
        drawn = (taken.x - taken.mean) / width
        self.x = taken.x + column(taken.std, self.x) * shift
        change = (shift.square() / 2 + shift * drawn).flatten(1).to(torch.float64).sum(1)
        self.log_weight = self.log_weight - torch.where(taken.std > 0, change, 0.0).cpu()
