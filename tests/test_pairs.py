"""Policies that form preference pairs: who is paired with whom, on numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from align.maths import pairs
from align.maths.pairs import Pairs

NAN = math.nan


def numbers(*values: float) -> Tensor:
    return torch.tensor(values)


def one_group(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.long)


def found(made: Pairs) -> list[tuple[int, int]]:
    """(winner, loser) of the valid pairs."""
    return [(int(w), int(x)) for w, x, ok in zip(made.winner, made.loser, made.valid, strict=True) if ok]


def test_dominance_asks_for_all_parts():
    parts = torch.tensor([[3.0, 3.0, 3.0], [2.0, 2.0, 2.0], [1.0, 4.0, 1.0], [2.0, 1.0, NAN]])
    made = pairs.dominance(parts, one_group(4))
    assert found(made) == [(0, 1)]  # 2 is better than all in one part, 3 is not known in one
    assert made.gap[made.valid].tolist() == [1.0]
    assert len(made) == 6
    assert found(pairs.dominance(parts, one_group(4), margin=1.0)) == []
    assert found(pairs.dominance(parts[:, :1], one_group(4))) == found(pairs.all_pairs(parts[:, 0], one_group(4)))


def test_conflicting_judges_drop_a_pair():
    first, second = numbers(1, 0, 1, 0), numbers(5, 3, 3, 5)
    assert found(pairs.agree(first, second, torch.tensor([0, 0, 1, 1]))) == [(0, 1)]
    assert found(pairs.agree(first[:2], first[:2], one_group(2))) == [(0, 1)]  # both the same: one pair
    assert found(pairs.agree(first[:2], numbers(3, 3), one_group(2))) == []


def test_thresholds_and_gap_are_strict():
    scores, group = numbers(6.0, 5.75, 4.5, 4.25, 3.0), one_group(5)
    everyone = torch.ones(5, dtype=torch.bool)
    assert found(pairs.threshold_gap(scores, everyone, group, gap=1.5)) == [(0, 3), (0, 4), (1, 4)]
    assert found(pairs.threshold_gap(scores, everyone, group, gap=1.5, best=1)) == [(0, 3), (0, 4)]
    assert found(pairs.threshold_gap(scores, torch.tensor([False, True, True, True, True]), group, 1.5)) == [(1, 4)]
    assert found(pairs.threshold_gap(numbers(2.5, 1.0), everyone[:2], one_group(2), gap=1.5)) == []


def test_ranking_then_sifting_takes_the_winner_from_the_chosen():
    verdicts, scores = numbers(1, 0, 1, 0, 0, 1), numbers(7, 10, 9, 2, 3, 8)
    made = pairs.rank_then_sift(verdicts, scores, one_group(6))
    assert found(made) == [(2, 3)]  # 1 has the highest score, and lost its comparison
    assert made.gap.tolist() == [7.0]
    assert found(pairs.rank_then_sift(numbers(1, 0), numbers(10, 9), one_group(2))) == [(0, 1)]  # numbers, not text
    assert found(pairs.rank_then_sift(numbers(1, 1, 0, 0), numbers(1, 2, 3, 4), one_group(4))) == []  # ties
    assert found(pairs.rank_then_sift(numbers(1, 0), numbers(3, 3), one_group(2))) == []
    assert found(pairs.rank_then_sift(numbers(1, 0), numbers(3, NAN), one_group(2))) == []
    assert found(pairs.rank_then_sift(numbers(1, NAN), numbers(3, 2), one_group(2))) == []
    assert found(pairs.rank_then_sift(numbers(1, 0, 1), numbers(5, 4, 9), one_group(3))) == [(0, 1)]  # 2 met nobody
    assert len(pairs.rank_then_sift(numbers(1, 0, 1, 0), numbers(4, 3, 2, 1), torch.tensor([0, 0, 1, 1]))) == 2


def test_the_best_of_n_are_references_for_the_others():
    scores, group = numbers(0.3, 0.9, 0.1, 0.8), one_group(4)
    assert pairs.win_counts(scores, group).tolist() == [1, 3, 0, 2]
    assert pairs.win_counts(numbers(0.5, 0.5, NAN), one_group(3)).tolist() == [0, 0, -1]
    assert sorted(found(pairs.best_of_n_reference(scores, group, k=2))) == [(1, 0), (1, 2), (3, 0), (3, 2)]
    assert found(pairs.best_of_n_reference(scores, group, k=4)) == []
    assert found(pairs.best_of_n_reference(numbers(1, 1, 1), one_group(3), k=1)) == []


def test_passed_and_failed_are_paired_across_prompts():
    scores, group = numbers(1, 0, 1, 0, 1, NAN), torch.tensor([0, 0, 1, 1, 2, 2])
    made = pairs.pass_fail(scores, group, passing=1.0, per_winner=10)
    assert made.tie is not None
    wins = {(int(w), int(x)) for w, x, tie in zip(made.winner, made.loser, made.tie, strict=True) if not tie}
    ties = {(int(w), int(x)) for w, x, tie in zip(made.winner, made.loser, made.tie, strict=True) if tie}
    assert wins == {(0, 3), (2, 1), (4, 1), (4, 3)}
    assert ties == {(0, 2), (0, 4), (2, 4)}
    assert made.gap[made.tie].tolist() == [0, 0, 0]
    few = pairs.pass_fail(scores, group, passing=1.0, per_winner=1, seed=3)
    again = pairs.pass_fail(scores, group, passing=1.0, per_winner=1, seed=3)
    assert len(few) == 3
    assert few.loser.tolist() == again.loser.tolist()
    assert len(pairs.pass_fail(numbers(0, 0), torch.tensor([0, 1]), 1.0, 5)) == 0  # two that failed


POLICIES = {
    "best_worst": lambda r, g: pairs.best_worst(r, g),
    "all": lambda r, g: pairs.all_pairs(r, g),
    "rank_then_sift": lambda r, g: pairs.rank_then_sift(r, r, g),
    "agree": lambda r, g: pairs.agree(r, r, g),
    "threshold_gap": lambda r, g: pairs.threshold_gap(r, torch.ones_like(r, dtype=torch.bool), g, 0.0),
    "dominance": lambda r, g: pairs.dominance(r[:, None], g),
    "best_of_n_reference": lambda r, g: pairs.best_of_n_reference(r, g),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_pairs_equal_samples_or_missing_scores(policy: str) -> None:
    form = POLICIES[policy]
    assert found(form(torch.full((4,), 0.7), one_group(4))) == []
    assert found(form(numbers(0.7), one_group(1))) == []
    assert found(form(torch.full((4,), NAN), one_group(4))) == []
    assert len(form(torch.empty(0), one_group(0))) == 0
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0))
    rewards[5] = NAN
    group = torch.arange(24) % 4
    made = form(rewards, group)
    assert (group[made.winner] == group[made.loser]).all()
    assert (rewards[made.winner[made.valid]] > rewards[made.loser[made.valid]]).all()
    assert made.valid.any()
    assert len(made) == len(form(torch.full((24,), 0.7), group))  # by the sizes of the groups alone


def test_the_widest_gaps_of_a_prompt_are_kept():
    made = pairs.all_pairs(numbers(4, 1, 3, 9, 9), torch.tensor([0, 0, 0, 1, 1]))
    assert found(pairs.widest(made, torch.tensor([0, 0, 0, 1, 1]), 1)) == [(0, 1)]
    assert len(found(pairs.widest(made, torch.tensor([0, 0, 0, 1, 1]), 2))) == 2
    assert found(pairs.widest(made, torch.tensor([0, 0, 0, 1, 1]), 9)) == found(made)
    assert len(list(combinations(range(3), 2))) == len(found(made))
