"""Terms of a recipe's loss: which samples they belong to, when they are noised, and their weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple, Self

from align.maths import losses
from align.maths.schedules import stratified_times
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor

    from align.rollout.bench import Point as Point
    from align.rollout.rollout import Scored as Scored
    from rewards.base import Scores as Scores
else:
    torch, Tensor = lazy("torch"), lazy("torch:Tensor")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The M summands of one rollout's loss. A recipe with more fields derives a class; all of them are ``[M, ...]``.

    Args:
        sample: ``[M]`` row of the rollout to which a term belongs.
        slot: ``[M]`` which of its sample's terms it is; with ``sample`` it names the term's noise.
        weight: ``[M]`` weight in the mean; 0 for a sample that is not trained on.
    """

    sample: Tensor
    slot: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return self.sample.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Self:
        return type(self)(**{one.name: getattr(self, one.name)[rows] for one in fields(self)})


@dataclass(frozen=True, kw_only=True)
class NoisedTerms(Terms):
    """Terms that re-noise a sample.

    Args:
        t: ``[M]`` time of the noised copy.
        credit: ``[M]`` of its sample.
    """

    t: Tensor
    credit: Tensor

    @classmethod
    def of(cls, rollout: Scored, credit: Tensor, weight: Tensor, slots: range, span: tuple[float, float]) -> Self:
        """Every sample at a stratified time of ``span`` per slot, with the credit and weight ``[N]`` of its sample."""
        count = len(credit)
        sample, slot = torch.arange(count).repeat_interleave(len(slots)), torch.tensor([*slots]).repeat(count)
        t = stratified_times(rollout.seeds, len(slots), span).flatten()
        return cls(sample=sample, slot=slot, weight=weight[sample], t=t, credit=credit[sample])


@dataclass(frozen=True, kw_only=True)
class GroupTerms(Terms):
    """Terms that are a whole group of G samples, noised to one time.

    Args:
        t: ``[M]`` time of the noised copies.
        members: ``[M, G]`` rows of the rollout.
        credit: ``[M, G]`` of the members.
        valid: ``[M, G]`` bool, whether a member is trained on.
    """

    t: Tensor
    members: Tensor
    credit: Tensor
    valid: Tensor


class Noised(NamedTuple):
    """M noised copies: the samples ``x0``, the noise ``eps``, and the point ``x_t`` between them."""

    x0: Tensor
    eps: Tensor
    point: Point


@dataclass(frozen=True, kw_only=True)
class ScoredLoss(losses.Loss):
    """Loss of a recipe that samples and scores in its loss, with one term per sample.

    Args:
        scores: of the terms' samples ``[M]``, without graph. The mean leaves out a term without a score; its value is
            finite.
        media: ``[M, ...]`` in [0, 1], what was scored, on the CPU.
    """

    scores: Scores
    media: Tensor
