"""Mixtures by hand: weights, ranges, groups, and what a missing member does."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from rewards.base import Reward, RewardError, RewardSettings, Scores
from rewards.mixture import Mixture, normalise


class Fixed(RewardSettings):
    """Given numbers."""

    kind: Literal["fixed"] = "fixed"
    values: tuple[float | None, ...]
    span: tuple[float, float] = (-math.inf, math.inf)
    why: str = ""

    def build(self, device="cpu"):
        def function(media, prompts, group):
            missing = {i: self.why for i, value in enumerate(self.values) if value is None and self.why}
            return Scores(torch.tensor([math.nan if v is None else v for v in self.values]), missing)

        return Reward("fixed", function, range=self.span)


def mixture(group=None, prompts=None, **parts):
    count = len(next(iter(parts.values()))["reward"].values)
    reward = Mixture(parts=parts).build()
    return reward, reward(torch.zeros(count, 3, 2, 2), prompts or ["x"] * count, group)


def test_mixture_adds_up():
    reward, scores = mixture(
        raw={"reward": Fixed(values=(1, 2, 3, 6)), "weight": 0.5},
        ranged={"reward": Fixed(values=(10, 20, 30, 15), span=(10, 30)), "normalise": "range", "weight": -2},
    )
    assert scores.values.tolist() == [0.5, 1 - 1, 1.5 - 2, 3 - 0.5]
    assert scores.parts["raw"].tolist() == [1, 2, 3, 6]
    assert scores.parts["ranged"].tolist() == [10, 20, 30, 15]
    assert reward.range == (-math.inf, math.inf)
    assert not reward.differentiable
    only, _ = mixture(a={"reward": Fixed(values=(1, 2), span=(0, 5)), "weight": -2}, b={
        "reward": Fixed(values=(1, 2), span=(0, 5)), "normalise": "range", "weight": 3})  # fmt: skip
    assert only.range == (-10, 3)


def test_mixture_normalises_in_groups_and_batches():
    group = torch.tensor([0, 0, 1, 1, 2])
    # group 0: mean 2, deviation 1; group 1: no spread; group 2: alone
    _, scores = mixture(group, a={"reward": Fixed(values=(1, 3, 5, 5, 9)), "normalise": "group"})
    assert scores.values.tolist() == [-1, 1, 0, 0, 0]
    # the same groups, told by the prompts
    _, scores = mixture(None, list("ppqqr"), a={"reward": Fixed(values=(1, 3, 5, 5, 9)), "normalise": "group"})
    assert scores.values.tolist() == [-1, 1, 0, 0, 0]
    # batch: mean 4, squares 9 + 1 + 1 + 9 = 20 over 4, deviation sqrt 5
    _, scores = mixture(a={"reward": Fixed(values=(1, 3, 5, 7)), "normalise": "batch", "weight": math.sqrt(5)})
    torch.testing.assert_close(scores.values, torch.tensor([-3.0, -1, 1, 3]))
    # 0.1 three times has a tiny deviation from rounding, which must not be blown up
    _, scores = mixture(a={"reward": Fixed(values=(0.1, 0.1, 0.1)), "normalise": "batch"})
    assert scores.values.tolist() == [0, 0, 0]


def test_mixture_names_the_member_that_failed():
    _, scores = mixture(
        a={"reward": Fixed(values=(1, None, 3), why="too dark"), "normalise": "batch"},
        b={"reward": Fixed(values=(None, None, 1))},
    )
    # of a only 1 and 3 count: mean 2, deviation 1
    assert scores.values.isnan().tolist() == [True, True, False]
    assert scores.values[2] == 1 + 1
    assert scores.reasons == {0: "b: the reward returned nan", 1: "a: too dark; b: the reward returned nan"}
    assert scores.parts["a"][0] == 1


def test_mixture_of_mixtures():
    inner = Mixture(parts={"x": {"reward": Fixed(values=(1, None))}})
    _, scores = mixture(a={"reward": Fixed(values=(1, 2))})
    outer = Mixture(parts={"in": {"reward": inner, "weight": 2}}).build()
    scores = outer(torch.zeros(2, 3, 2, 2), ["p", "q"])
    assert scores.values[0] == 2
    assert scores.reasons == {1: "in: x: the reward returned nan"}
    assert set(scores.parts) == {"in", "in/x"}


def test_mixture_needs_a_range_to_normalise_by():
    with pytest.raises(RewardError, match="'a' has no finite range"):
        mixture(a={"reward": Fixed(values=(1, 2)), "normalise": "range"})


def test_normalised_statistics_are_constants_to_the_gradient():
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    normalise(values, "batch", (0, 1), torch.zeros(2))[0].backward()
    assert values.grad.tolist() == [1, 0]  # 1 / deviation, and nothing through mean or deviation
