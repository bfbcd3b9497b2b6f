"""Advantages, weights and pairs: what rewards turn into, and what must leave it unchanged."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.maths.advantages import group_advantage, zero_variance
from align.maths.pairs import all_pairs, best_worst, top_k_pairs
from align.maths.weights import nft_probability, softmax_weight

NAN = float("nan")
KINDS = ("group", "global", "centred", "none")
SOME = settings(max_examples=50, deadline=None)
reward_lists = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=24)


def rewards_and_groups(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards and three groups whose numbers have gaps, in a mixed order."""
    numbers = torch.tensor([7, -2, 1000])[torch.arange(len(values)) % 3]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values)[order], numbers[order]


def one_group(*values: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(values), torch.zeros(len(values), dtype=torch.long)


# -- advantages ---------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards, group = torch.tensor([1.0, 3.0, 10.0, 14.0]), torch.tensor([5, 5, 2, 2])
    by_group = group_advantage(rewards, group, eps=0.0)
    torch.testing.assert_close(by_group, torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    overall = math.sqrt((36 + 16 + 9 + 49) / 4)
    by_all = group_advantage(rewards, group, normalise_by="global", eps=0.0)
    torch.testing.assert_close(by_all, torch.tensor([-1.0, 1.0, -2.0, 2.0]) / overall)
    centred = group_advantage(rewards, group, normalise_by="centred", eps=0.0)
    torch.testing.assert_close(centred, torch.tensor([-1.0, 1.0, -2.0, 2.0]) / math.sqrt(2.5))
    assert group_advantage(rewards, group, normalise_by="none").tolist() == [-1, 1, -2, 2]
    torch.testing.assert_close(group_advantage(rewards, group, eps=1.0), torch.tensor([-1 / 2, 1 / 2, -2 / 3, 2 / 3]))


def test_advantages_are_clipped():
    rewards, group = one_group(*[0.0] * 99, 1.0)
    assert float(group_advantage(rewards, group).max()) == 5
    assert float(group_advantage(rewards, group, clip=2.0).max()) == 2
    assert float(group_advantage(rewards, group, clip=None).max()) == pytest.approx(math.sqrt(99), rel=1e-2)


@SOME
@given(reward_lists, st.sampled_from(KINDS))
def test_advantages_of_a_group_sum_to_zero(values, std):
    rewards, group = rewards_and_groups(values)
    advantage = group_advantage(rewards, group, normalise_by=std, clip=None)
    for number in group.unique():
        assert float(advantage[group == number].sum()) == pytest.approx(0, abs=1e-3)


@SOME
@given(reward_lists, st.sampled_from(KINDS))
def test_a_batch_given_twice_has_the_same_advantages(values, std):
    rewards, group = rewards_and_groups(values)
    once = group_advantage(rewards, group, normalise_by=std)
    twice = group_advantage(rewards.repeat(2), group.repeat(2), normalise_by=std)
    torch.testing.assert_close(twice, once.repeat(2))


@SOME
@given(reward_lists, st.sampled_from(KINDS), st.integers(0, 5))
def test_advantages_follow_their_rows(values, std, seed):
    rewards, group = rewards_and_groups(values)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    advantage = group_advantage(rewards, group, normalise_by=std)
    torch.testing.assert_close(group_advantage(rewards[order], group[order], normalise_by=std), advantage[order])


@pytest.mark.parametrize("std", KINDS)
def test_a_prompts_constant_changes_nothing_except_under_global(std):
    rewards, group = torch.tensor([0.1, 0.4, 0.3, 0.9, 0.2, 0.7]), torch.tensor([0, 0, 0, 1, 1, 1])
    shifted = rewards + torch.tensor([0.0, 0, 0, 3, 3, 3])
    before, after = (group_advantage(r, group, normalise_by=std) for r in (rewards, shifted))
    assert torch.allclose(before, after, atol=1e-5) is (std != "global")
    everywhere = group_advantage(rewards + 3, group, normalise_by=std)
    torch.testing.assert_close(everywhere, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("std", KINDS)
def test_missing_rewards_count_in_nothing(std):
    rewards, group = torch.tensor([1.0, NAN, 3.0, 4.0, 8.0, math.inf, NAN]), torch.tensor([0, 0, 0, 1, 1, 1, 2])
    known = torch.tensor([0, 2, 3, 4])
    advantage = group_advantage(rewards, group, normalise_by=std)
    torch.testing.assert_close(advantage[known], group_advantage(rewards[known], group[known], normalise_by=std))
    assert advantage[[1, 5, 6]].tolist() == [0, 0, 0]


@SOME
@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 30), st.sampled_from(KINDS))
def test_equal_rewards_give_exactly_zero(value, size, std):
    rewards, group = torch.full((size,), value), torch.zeros(size, dtype=torch.long)
    assert not group_advantage(rewards, group, normalise_by=std).any()
    assert zero_variance(rewards, group) == 1


def test_zero_variance_counts_groups_that_teach_nothing():
    rewards = torch.tensor([1.0, 1, 1, 2, NAN, 5, NAN, NAN, 0.3])
    group = torch.tensor([9, 9, 4, 4, 6, 6, 8, 8, 1])
    assert zero_variance(rewards, group) == 4  # all but group 4: equal, one known, none known, alone
    assert zero_variance(torch.tensor([1.0, 1 + 2e-7]), torch.tensor([0, 0])) == 0


def test_bad_calls_are_named():
    rewards, group = one_group(1, 2)
    with pytest.raises(ValueError, match="group, global, centred or none"):
        group_advantage(rewards, group, normalise_by="batch")
    with pytest.raises(ValueError, match=r"\[N\]"):
        group_advantage(rewards[:, None], group)


# -- weights ------------------------------------------------------------------------------------------------------


def test_nft_probability_by_mode():
    advantage = torch.tensor([-9.0, -2.0, 0.0, 1.0, 5.0])
    expected = {
        "all": [0, 0.3, 0.5, 0.6, 1],
        "positive_only": [0.5, 0.5, 0.5, 0.6, 1],
        "negative_only": [0, 0.3, 0.5, 0.5, 0.5],
        "one_only": [0.5, 0.5, 0.5, 0.6, 0.6],
        "binary": [0.4, 0.4, 0.5, 0.6, 0.6],
    }
    for mode, values in expected.items():
        torch.testing.assert_close(nft_probability(advantage, 5.0, mode), torch.tensor(values), msg=mode)
    torch.testing.assert_close(nft_probability(torch.tensor([1.0]), clip=2.0), torch.tensor([0.75]))
    with pytest.raises(ValueError, match="positive_only"):
        nft_probability(advantage, mode="some")


def test_softmax_weight_by_hand():
    rewards, group = torch.tensor([0.0, math.log(3.0), 7.0, 7.0]), torch.tensor([3, 3, 1, 1])
    torch.testing.assert_close(softmax_weight(rewards, group, 1.0), torch.tensor([0.5, 1.5, 1.0, 1.0]))
    torch.testing.assert_close(softmax_weight(rewards, group, 0.5), torch.tensor([0.2, 1.8, 1.0, 1.0]))
    torch.testing.assert_close(softmax_weight(rewards, group, 1.0, clip=1.2), torch.tensor([0.5, 1.2, 1.0, 1.0]))


@SOME
@given(reward_lists, st.floats(0.05, 5), st.booleans())
def test_softmax_weights_average_one_and_rise_with_reward(values, temperature, standardise):
    rewards, group = rewards_and_groups(values)
    weight = softmax_weight(rewards, group, temperature, standardise=standardise)
    shifted = softmax_weight(rewards + 4 * (group == 7), group, temperature, standardise=standardise)
    for number in group.unique():
        mine = group == number
        assert float(weight[mine].mean()) == pytest.approx(1, rel=1e-5)
        order = rewards[mine].argsort()
        assert (weight[mine][order].diff() >= 0).all()
    if not standardise:
        torch.testing.assert_close(weight, shifted, rtol=1e-3, atol=1e-3)


def test_softmax_weights_of_extreme_and_missing_rewards():
    rewards, group = torch.tensor([1e4, -1e4, NAN, NAN, 5.0]), torch.tensor([0, 0, 0, 1, 2])
    assert softmax_weight(rewards, group, 1e-3).tolist() == [2, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="temperature"):
        softmax_weight(rewards, group, 0.0)


def test_standardised_temperature_has_no_unit():
    rewards, group = torch.tensor([1.0, 2.0, 4.0, 4.5]), torch.zeros(4, dtype=torch.long)
    weights = [softmax_weight(scale * rewards, group, 0.5, standardise=True) for scale in (10.0, 1000.0)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=0)
    plain = [softmax_weight(scale * rewards, group, 0.5) for scale in (0.1, 1.0)]
    assert not torch.allclose(*plain, rtol=0.1)


# -- pairs --------------------------------------------------------------------------------------------------------


def test_best_and_worst_of_each_group():
    rewards = torch.tensor([0.2, 0.9, 0.5, 0.1, 0.4, NAN, 3.0, 3.0])
    group = torch.tensor([8, 8, 8, 2, 2, 2, 5, 5])
    pairs = best_worst(rewards, group)
    assert pairs.winner[:2].tolist() == [4, 6]
    assert pairs.loser[:2].tolist() == [3, 7]
    assert (pairs.winner[2], pairs.loser[2]) == (1, 0)
    torch.testing.assert_close(pairs.gap, torch.tensor([0.3, 0.0, 0.7]))
    assert pairs.valid.tolist() == [True, False, True]
    assert best_worst(rewards, group, margin=0.5).valid.tolist() == [False, False, True]


def test_one_pair_for_every_group_whatever_is_missing():
    rewards = torch.tensor([NAN, NAN, 1.0, NAN, 2.0])
    pairs = best_worst(rewards, torch.tensor([0, 0, 1, 1, 2]))
    assert len(pairs) == 3
    assert not pairs.valid.any()
    assert not pairs.gap.any()
    assert torch.cat([pairs.winner, pairs.loser]).max() < 5
    assert not best_worst(*one_group(1.0), margin=-1.0).valid.any()


def test_top_pairs_match_ranks_from_both_ends():
    rewards, group = one_group(5, 1, 4, 2, 3, 6)
    pairs = top_k_pairs(rewards, group, 3)
    assert rewards[pairs.winner].tolist() == [6, 5, 4]
    assert rewards[pairs.loser].tolist() == [1, 2, 3]
    assert len(top_k_pairs(rewards, group, 9)) == 3
    with pytest.raises(ValueError, match="k should be"):
        top_k_pairs(rewards, group, 0)


missing_rewards = st.lists(st.one_of(st.floats(-5, 5, width=32), st.just(NAN)), min_size=1, max_size=12)


@SOME
@given(missing_rewards, st.integers(1, 4))
def test_no_sample_is_in_two_top_pairs_and_their_number_is_fixed(values, k):
    rewards, group = rewards_and_groups(values)
    pairs = top_k_pairs(rewards, group, k)
    sizes = [int((group == number).sum()) for number in group.unique()]
    assert len(pairs) == sum(min(k, max(size // 2, 1)) for size in sizes)
    used = torch.cat([pairs.winner[pairs.valid], pairs.loser[pairs.valid]])
    assert len(used.unique()) == len(used)
    assert torch.equal(group[pairs.winner], group[pairs.loser])
    assert (rewards[pairs.winner] > rewards[pairs.loser])[pairs.valid].all()


@SOME
@given(missing_rewards)
def test_all_pairs_are_each_two_once_and_better_first(values):
    rewards, group = rewards_and_groups(values)
    pairs = all_pairs(rewards, group, margin=-1.0)
    sizes = [int((group == number).sum()) for number in group.unique()]
    assert len(pairs) == sum(size * (size - 1) // 2 for size in sizes)
    met = {frozenset(pair) for pair in zip(pairs.winner.tolist(), pairs.loser.tolist(), strict=True)}
    assert len(met) == len(pairs)
    assert all(len(pair) == 2 for pair in met)
    known = rewards.isfinite()
    assert torch.equal(pairs.valid, known[pairs.winner] & known[pairs.loser])
    assert (pairs.gap >= 0).all()
    torch.testing.assert_close(pairs.gap[pairs.valid], (rewards[pairs.winner] - rewards[pairs.loser])[pairs.valid])


def test_ties_are_pairs_only_for_a_negative_margin():
    rewards, group = one_group(1, 1, 2)
    assert int(all_pairs(rewards, group).valid.sum()) == 2
    assert int(all_pairs(rewards, group, margin=-1.0).valid.sum()) == 3
    shifted = all_pairs(rewards + 10, group)
    assert torch.equal(shifted.winner, all_pairs(rewards, group).winner)
    assert torch.equal(shifted.gap, all_pairs(rewards, group).gap)
