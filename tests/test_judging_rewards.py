"""Rewards of judges that write their verdicts, with the published numbers."""

from __future__ import annotations

import pytest
import torch

from align.maths.judging import (
    accuracy_reward,
    exploration_reward,
    gain_reward,
    listener_reward,
    rubric_reward,
    thought_reward,
    verdict_reward,
)  # fmt: skip


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_form_and_accuracy_add_up():
    assert verdict_reward(column(1, 1, 0), column(1, 0, 0)).tolist() == [2, 1, 0]


def test_a_listener_that_is_convinced_counts_as_much_as_the_verdict():
    found = listener_reward(column(1, 1), column(1, 0), column(0.8, 0.0))
    assert found.tolist() == pytest.approx([1.9, 1.0])


def test_a_rubric_is_worth_most_where_the_proxy_is_right_too():
    right, proxy, form = column(1, 1, 0, 0), column(1, 0, 1, 0), torch.zeros(4)
    assert rubric_reward(form, right, proxy).tolist() == [1.5, 0.5, -1, -1]
    assert rubric_reward(form + 1, right, proxy).tolist() == [2.0, 1.0, -0.5, -0.5]
    assert rubric_reward(form, right, proxy, additive=True).tolist() == [2, 0, 0, -2]


def test_reasoning_is_rewarded_by_its_length_in_steps():
    lengths = [499, 500, 1000, 1499, 1600, 2000]
    found = thought_reward(torch.zeros(6), torch.zeros(6), lengths)
    assert (found / 0.2).tolist() == pytest.approx([0, 0.2, 0.4, 0.4, 0.6, 1.0])
    assert thought_reward(column(1.0), column(1.0), [2000]).item() == pytest.approx(1.0)


def test_accuracy_is_half_of_the_pair_and_half_of_its_dimensions():
    pair, dimensions = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 1 / 3, 2 / 3])
    assert accuracy_reward(pair, dimensions).tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert accuracy_reward(pair, dimensions, 1.0).tolist() == pair.tolist()


def test_the_gain_of_rounds_is_the_last_accuracy_minus_the_first():
    assert gain_reward([[0.0, 0.25, 1.0], [1.0, 0.5], [0.5]]).tolist() == pytest.approx([0.2, -0.1, 0.0])


def test_exploration_counts_for_those_that_look_where_few_do():
    looked, group = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 1, 1]), torch.tensor([0] * 8 + [1] * 2)
    found = exploration_reward(looked, group)
    assert found.tolist() == pytest.approx([0.5 * (0.2 - 1 / 8), 0, 0, 0, 0, 0, 0, 0, 0, 0])
