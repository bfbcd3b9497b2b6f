"""Rewards -> pairs of a better and a worse sample of the same prompt.

The number of pairs depends on the sizes of the groups alone, never on the rewards, so that every process has the same
number of terms; pairs that mean nothing are there and not ``valid``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Pairs:
    """P pairs, group by group in rising order of the group's number.

    Args:
        winner: ``[P]`` row of the better sample.
        loser: ``[P]`` row of the other one.
        gap: ``[P]`` reward of the winner less that of the loser; 0 where a reward is missing.
        valid: ``[P]`` whether both rewards are there and ``gap > margin``. An invalid pair has indices that exist.
    """

    winner: Tensor
    loser: Tensor
    gap: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return self.winner.shape[0]


def best_worst(rewards: Tensor, group: Tensor, margin: float = 0.0) -> Pairs:
    """The best and the worst sample of each group: one pair per group."""
    return top_k_pairs(rewards, group, 1, margin)


def top_k_pairs(rewards: Tensor, group: Tensor, k: int, margin: float = 0.0) -> Pairs:
    """Best with worst, second best with second worst, ...: ``min(k, size // 2)`` pairs per group, at least one.

    Args:
        rewards: ``[N]``; missing ones (not finite) are in no valid pair.
        group: ``[N]`` integers, one per prompt.
        k: pairs per group; no sample is in two.
        margin: a pair is valid if its gap is larger.
    """
    if k < 1:
        raise ValueError(f"k should be at least 1, given {k}")
    winners, losers = [], []
    for members in _groups(group):
        ranked, known = _ranked(rewards, members)
        count = min(k, max(len(members) // 2, 1))
        rank = torch.arange(count, device=members.device)
        # Past the middle of the known rewards the pair is invalid: its loser is the last, whose reward is missing.
        worst = torch.where(rank < known // 2, known - 1 - rank, len(members) - 1)
        winners.append(ranked[rank])
        losers.append(ranked[worst])
    return _pairs(rewards, winners, losers, margin)


def all_pairs(rewards: Tensor, group: Tensor, margin: float = 0.0) -> Pairs:
    """Every two samples of a group, the better one first: ``size (size - 1) / 2`` pairs per group.

    Args:
        rewards: ``[N]``; missing ones (not finite) are in no valid pair.
        group: ``[N]`` integers, one per prompt.
        margin: a pair is valid if its gap is larger; a negative margin keeps ties, which also teach a regression.
    """
    winners, losers = [], []
    for members in _groups(group):
        ranked, _ = _ranked(rewards, members)
        first, second = torch.triu_indices(len(members), len(members), 1, device=members.device)
        winners.append(ranked[first])
        losers.append(ranked[second])
    return _pairs(rewards, winners, losers, margin)


def _groups(group: Tensor) -> list[Tensor]:
    """Rows of each group, in rising order of both."""
    return [(group == number).nonzero().flatten() for number in group.unique()]


def _ranked(rewards: Tensor, members: Tensor) -> tuple[Tensor, int]:
    """The members from best to worst, missing rewards last, equal ones in order; and how many are not missing."""
    values = rewards[members]
    known = values.isfinite()
    order = torch.where(known, values, -torch.inf).sort(descending=True, stable=True).indices
    return members[order], int(known.sum())


def _pairs(rewards: Tensor, winners: list[Tensor], losers: list[Tensor], margin: float) -> Pairs:
    none = torch.empty(0, dtype=torch.long, device=rewards.device)
    winner, loser = torch.cat([none, *winners]), torch.cat([none, *losers])
    gap = rewards[winner] - rewards[loser]
    known = gap.isfinite() & (winner != loser)
    return Pairs(winner, loser, torch.where(known, gap, 0.0), known & (gap > margin))
