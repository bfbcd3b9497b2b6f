"""Weighted particles: sequential Monte Carlo towards ``p(x) exp(strength * reward)``, shared by FK, DAS and Psi.

Weights live in the log domain and continue where resampling is skipped. Along any line of ancestors the potentials
multiply to ``exp(strength * reward)`` of the finished sample: the last one is what the others left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from align.maths.losses import column
from align.search.particles import Particles
from align.search.rows import rows_of
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.task import Task
else:
    torch = lazy("torch")


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
    """Settings in which particle methods differ.

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


@dataclass(frozen=True, eq=False, kw_only=True)
class Weighed(Particles):
    """Particles with what resampling goes by, each ``[N]`` float64 on the CPU.

    Args:
        log_weight: logarithm of the weight, not normalised.
        charged: sum of the potentials so far, given up by resampling or not.
        so_far: highest value so far, or their sum, as the potential needs it.
    """

    log_weight: Tensor
    charged: Tensor
    so_far: Tensor


class Cloud:
    """K weighted particles for each of B prompts, on their way.

    Args:
        start: ``B * K`` of them at the first step.
        tilted: whether they were sampled from the distribution already tilted by their value, not from noise.
    """

    def __init__(self, task: Task, plan: Plan, start: Particles, tilted: bool = False) -> None:
        self.task, self.plan, self.tilted = task, plan, tilted
        self.count = len(start) // task.prompts
        zeros = torch.zeros(len(start), dtype=torch.float64)
        so_far = torch.full_like(zeros, -torch.inf) if plan.potential == "max" else zeros
        self.now = Weighed(**vars(start.numbered()), log_weight=zeros, charged=zeros, so_far=so_far)

    def run(self, *purpose: int | str) -> None:
        """From the first step to scored samples."""
        task = self.task
        for i in range(task.steps):
            if i in self.plan.valued:
                self.now = self._weighed(i)
                if task.noisy(i):
                    self.now = self._resampled(i, *purpose)
            else:
                self.now = self.now.moved(self.now.x, task.velocity(self.now, task.times[i]))
            self.now = self._stepped(i, *purpose)
        task.score(self.now, self._last_weight)

    def _weighed(self, i: int) -> Weighed:
        """With velocity, value and the potential before step ``i``."""
        now, strength = self._valued(i), self.plan.strengths[i]
        value = now.value
        known, so_far = value.nan_to_num(0.0), now.so_far
        if self.plan.potential == "diff":
            charged = strength * known
            gain = charged - now.charged
        else:
            highest = torch.maximum(so_far, value.nan_to_num(-torch.inf))
            so_far = highest if self.plan.potential == "max" else so_far + known
            gain = strength * so_far
            charged = now.charged + gain
        if i == 0 and self.tilted:
            gain = torch.zeros_like(gain)
        log_weight = now.log_weight + self._without_missing(gain, value)
        charged = torch.where(value.isnan(), now.charged, charged)
        return replace(now, log_weight=log_weight, charged=charged, so_far=so_far)

    def _valued(self, i: int) -> Weighed:
        task, t, now = self.task, self.task.times[i], self.now
        if self.plan.guided:
            judged = task.value_and_grad(now, t)
            return replace(now, v=judged.v, value=judged.value, grad=judged.grad)
        now = now.moved(now.x, task.velocity(now, t))
        return now.valued(task.value(now, t))

    def _without_missing(self, gain: Tensor, value: Tensor) -> Tensor:
        """A particle without a value is never an ancestor; where none has one, nothing changes."""
        missing = value.isnan().view(-1, self.count)
        none = missing.all(1, keepdim=True).expand_as(missing)
        return torch.where(none, 0.0, torch.where(missing, -torch.inf, gain.view_as(missing))).flatten()

    def _last_weight(self, reward: Tensor) -> Tensor:
        gain = self.plan.strengths[-1] * reward.nan_to_num(0.0) - self.now.charged
        self.now = replace(self.now, log_weight=self.now.log_weight + self._without_missing(gain, reward))
        return self.now.log_weight

    def _resampled(self, i: int, *purpose: int | str) -> Weighed:
        """Copies of the heavy in place of the light, for the prompts whose weights have become too unequal.

        Step ``i`` adds noise, so copies do not stay equal.
        """
        now, table = self.now, self.now.log_weight.view(-1, self.count)
        ancestors = systematic(table, self.task.uniform(*purpose, "resample", i))
        needed = (effective_size(table) < self.plan.resample_below * self.count) | (self.plan.resample_below >= 1)
        needed &= (table != table[:, :1]).any(1)
        if not bool(needed.any()):
            return now
        copies = now[rows_of(ancestors, self.count)]
        copies = copies.named(f"step {i}: of particle", copies.number).numbered()
        copies = replace(copies, log_weight=torch.zeros_like(copies.log_weight))
        return copies.where(needed.repeat_interleave(self.count), now)

    def _stepped(self, i: int, *purpose: int | str) -> Weighed:
        now, grad = self.now, self.now.grad
        taken = self.task.step(now, i, *purpose)
        if grad is None or not self.task.noisy(i):
            return now.moved(taken.x)
        shift = self.plan.strengths[i + 1] * column(taken.std, now.x) * grad  # in standard deviations
        if self.plan.cap is not None:
            size = shift.flatten(1).square().mean(1).sqrt()
            shift = shift * column((self.plan.cap / size).clamp_max(1.0), shift)
        width = column(torch.where(taken.std > 0, taken.std, 1.0), now.x)
        drawn = (taken.x - taken.mean) / width
        change = (shift.square() / 2 + shift * drawn).flatten(1).to(torch.float64).sum(1)
        log_weight = now.log_weight - torch.where(taken.std > 0, change, 0.0).cpu()
        return replace(now.moved(taken.x + column(taken.std, now.x) * shift), log_weight=log_weight)
