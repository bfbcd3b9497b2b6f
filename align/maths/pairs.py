"""Rewards -> pairs of a better and a worse sample.

The number of pairs depends on the sizes of the groups alone, never on the rewards, so that every process has the same
number of terms; meaningless pairs are included and not ``valid``. Only :func:`pass_fail` pairs samples of different
prompts, and has as many pairs as it finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignflow.groups import members
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
        gap: ``[P]`` reward of the winner less that of the loser; 0 if a reward is missing.
        valid: ``[P]`` whether both rewards are there and ``gap > margin``. An invalid pair has indices that exist.
        tie: ``[P]`` whether neither sample is better; None = there are no such pairs.
    """

    winner: Tensor
    loser: Tensor
    gap: Tensor
    valid: Tensor
    tie: Tensor | None = None

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
    for rows in members(group):
        ranked, known = _ranked(rewards, rows)
        count = min(k, max(len(rows) // 2, 1))
        rank = torch.arange(count, device=rows.device)
        # Past the middle of the known rewards the pair is invalid: its loser is the last, whose reward is missing.
        worst = torch.where(rank < known // 2, known - 1 - rank, len(rows) - 1)
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
    for rows in members(group):
        ranked, _ = _ranked(rewards, rows)
        first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
        winners.append(ranked[first])
        losers.append(ranked[second])
    return _pairs(rewards, winners, losers, margin)


def dominance(parts: Tensor, group: Tensor, margin: float = 0.0) -> Pairs:
    """Every two samples of a group of which one is better in all respects (as for FantasyTalking2, arXiv 2508.11255).

    Args:
        parts: ``[N, K]`` scores in K respects; a missing one (not finite) leaves its sample out.
        group: ``[N]`` integers, one per prompt.
        margin: a pair is valid if all of its K gaps are larger.

    Returns:
        ``size (size - 1) / 2`` pairs per group, whose ``gap`` is the smallest of the K.
    """
    if parts.ndim != 2 or not parts.shape[1]:
        raise ValueError(f"parts should be [N, K], given {tuple(parts.shape)}")
    first = all_pairs(parts[:, 0], group, margin)
    gaps = parts[first.winner] - parts[first.loser]
    known = gaps.isfinite().all(1)
    gap = torch.where(known, gaps.amin(1), 0.0)
    return Pairs(first.winner, first.loser, gap, first.valid & known & (gap > margin))


def agree(first: Tensor, second: Tensor, group: Tensor, margin: float = 0.0) -> Pairs:
    """Every two samples of a group that two judges ``[N]`` put into the same order (VLIC, arXiv 2512.15701).

    The gap is the smaller of the two, and has to be larger than ``margin``.
    """
    return dominance(torch.stack([first, second], 1), group, margin)


def threshold_gap(rewards: Tensor, passed: Tensor, group: Tensor, gap: float, best: int = 2) -> Pairs:
    """A sample of the ``best`` that passed thresholds, with every one that is worse by more than ``gap``.

    Prompt-A-Video (arXiv 2412.15156): rank 1 or 2 of five, thresholds on all dimensions, gap 1.4.

    Args:
        rewards: ``[N]``.
        passed: ``[N]`` bool, whether a sample may be a winner.
        group: ``[N]`` integers, one per prompt.
        best: ranks of a group that may be winners; equal rewards rank in their order.
    """
    found, rank = all_pairs(rewards, group, gap), torch.zeros_like(group)
    for rows in members(group):
        ranked, _ = _ranked(rewards, rows)
        rank[ranked] = torch.arange(len(ranked), device=group.device)
    able = passed[found.winner] & (rank[found.winner] < best)
    return Pairs(found.winner, found.loser, found.gap, found.valid & able)


def rank_then_sift(verdicts: Tensor, scores: Tensor, group: Tensor, margin: float = 0.0) -> Pairs:
    """UnifiedReward's pairs (arXiv 2503.05236): the best scored of the chosen with the worst scored of the rejected.

    The members of a group are compared two by two, first with second, third with fourth, and so on. The better ones
    are the chosen; a tie has none. One pair per group.

    Args:
        verdicts: ``[N]`` of the judge that compares; the higher one of two is chosen.
        scores: ``[N]`` of the judge that scores; compared as numbers.
        group: ``[N]`` integers, one per prompt.
        margin: a pair is valid if its gap in ``scores`` is larger.
    """
    winners, losers, decided = [], [], []
    for rows in members(group):
        duels = rows[: len(rows) // 2 * 2].reshape(-1, 2)
        lead = verdicts[duels[:, 0]] - verdicts[duels[:, 1]]
        ordered = torch.where((lead > 0)[:, None], duels, duels.flip(1))
        usable = ordered[(lead != 0) & lead.isfinite() & scores[ordered].isfinite().all(1)]
        decided.append(len(usable) > 0)
        chosen, rejected = (usable if len(usable) else rows[[0, -1]][None]).unbind(1)
        winners.append(chosen[scores[chosen].argmax()][None])
        losers.append(rejected[scores[rejected].argmin()][None])
    found = _pairs(scores, winners, losers, margin)
    valid = found.valid & torch.tensor(decided, dtype=torch.bool, device=group.device)
    return Pairs(found.winner, found.loser, found.gap, valid)


def win_counts(rewards: Tensor, group: Tensor) -> Tensor:
    """How many samples of its group each sample beats, ``[N]``; -1 if its reward is missing."""
    count = torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)
    for rows in members(group):
        values = rewards[rows]
        wins = (values[:, None] > values[None]).sum(1)
        count[rows] = torch.where(values.isfinite(), wins, -1)
    return count


def best_of_n_reference(rewards: Tensor, group: Tensor, k: int = 2, margin: float = 0.0) -> Pairs:
    """The k samples of a group with most wins, RewardDance's references (arXiv 2509.08826), against each of the others.

    ``k (size - k)`` pairs per group; none in a group of k samples or fewer.
    """
    if k < 1:
        raise ValueError(f"k should be at least 1, given {k}")
    wins, winners, losers = win_counts(rewards, group).to(rewards.dtype), [], []
    for rows in members(group):
        ranked, _ = _ranked(torch.where(rewards.isfinite(), wins, torch.nan), rows)
        rest = len(ranked) - k
        if rest > 0:
            winners.append(ranked[:k].repeat_interleave(rest))
            losers.append(ranked[k:].repeat(k))
    return _pairs(rewards, winners, losers, margin)


def pass_fail(rewards: Tensor, group: Tensor, passing: float, per_winner: int, seed: int = 0) -> Pairs:
    """SoliReward's pairs across prompts: a sample that passed with one of another prompt, passed (a tie) or failed.

    Two that failed are never paired, and no two samples are paired twice.

    Args:
        rewards: ``[N]``; missing ones (not finite) are left out.
        group: ``[N]`` integers, one per prompt.
        passing: a sample passes if its reward is at least this.
        per_winner: random partners of each sample that passed; there may be fewer.

    Returns:
        as many pairs as there are, all valid; ``gap`` 0 for a tie.
    """
    generator = torch.Generator().manual_seed(seed)
    known, passed = rewards.isfinite(), rewards >= passing
    rows, winners, losers = torch.arange(len(rewards)), [], []
    for row in passed.nonzero().flatten().tolist():
        partners = ((group != group[row]) & known & (~passed | (rows > row))).nonzero().flatten()
        drawn = partners[torch.randperm(len(partners), generator=generator)[:per_winner].sort().values]
        winners.append(torch.full_like(drawn, row))
        losers.append(drawn)
    found = _pairs(rewards, winners, losers, 0.0)
    tie = passed[found.loser]
    gap = torch.where(tie, 0.0, found.gap)
    return Pairs(found.winner, found.loser, gap, torch.ones_like(tie), tie)


def widest(pairs: Pairs, group: Tensor, most: int) -> Pairs:
    """The pairs, of which only the ``most`` with the largest gaps of each group stay valid."""
    rank = torch.zeros_like(pairs.winner)
    order = torch.where(pairs.valid, pairs.gap, -torch.inf).sort(descending=True, stable=True).indices
    for rows in members(group[pairs.winner[order]]):
        rank[order[rows]] = torch.arange(len(rows), device=rank.device)
    return Pairs(pairs.winner, pairs.loser, pairs.gap, pairs.valid & (rank < most), pairs.tie)


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
