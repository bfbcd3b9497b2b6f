"""Losses of reward models against numbers in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from rewards.training import losses

LN2 = math.log(2)
gaps = st.floats(-8, 8)


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_is_softplus_of_the_gap():
    assert losses.bradley_terry(of(0, 2, 3), of(0, 0, 1), of(0, 0, 2)).tolist() == pytest.approx(
        [LN2, math.log1p(math.exp(-2)), LN2]
    )


@given(gaps, st.floats(1.01, 20))
def test_rao_kuppers_three_outcomes_exhaust_the_possible(gap, k):
    outcome = torch.tensor([1, 0, -1])
    loss = losses.rao_kupper(of(gap, gap, gap), of(0, 0, 0), outcome, k)
    assert float((-loss).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_rao_kupper_at_equal_scores_and_without_ties():
    found = losses.rao_kupper(of(0, 0, 0), of(0, 0, 0), torch.tensor([1, 0, -1]), 5.0)
    assert found.tolist() == pytest.approx([math.log(6), math.log(1.5), math.log(6)])
    near = losses.rao_kupper(of(1.5), of(0), torch.tensor([1]), 1 + 1e-12)
    assert near.item() == pytest.approx(losses.bradley_terry(of(1.5), of(0)).item())


def test_win_tie_is_smallest_at_equal_scores_and_bradley_terry_for_a_win():
    half = of(0.5, 0.5, 0.5)
    found = losses.win_tie(of(0, 2, -2), of(0, 0, 0), half)
    assert found.tolist() == pytest.approx([LN2, 1.126928, 1.126928], abs=1e-6)
    assert losses.win_tie(of(1), of(0), of(1)).item() == losses.bradley_terry(of(1), of(0)).item()


def test_triplet_is_twice_the_cosine_margin_on_the_sphere():
    rows = F.normalize(torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    text, good, bad = rows
    expected = F.relu(2 * ((text * bad).sum(-1) - (text * good).sum(-1)) + 0.3)
    assert torch.allclose(losses.triplet(text, good, bad), expected)
    assert losses.triplet(text, good, good).tolist() == pytest.approx([0.3] * 5)
    assert losses.triplet(text, text, -text).tolist() == [0.0] * 5


def test_regression_is_squared_error():
    assert losses.regression(of(1, 2), of(3, 2)).tolist() == [4.0, 0.0]


def test_gaussian_difference_without_deviation_is_bradley_terry():
    zero = of(0, 0)
    found = losses.gaussian_difference(of(1, -2), zero, of(0, 0), zero)
    assert torch.allclose(found, losses.bradley_terry(of(1, -2), of(0, 0)), atol=1e-12)


@given(gaps, st.floats(0.01, 5), st.floats(0.01, 5))
def test_gaussian_difference_has_the_symmetry_of_softplus(gap, first, second):
    # softplus(-z) - softplus(z) = -z, so the two orders differ by the mean exactly, whatever the deviation
    there = losses.gaussian_difference(of(gap), of(first), of(0), of(second))
    back = losses.gaussian_difference(of(0), of(second), of(gap), of(first))
    assert (there - back).item() == pytest.approx(-gap, abs=1e-9)


def test_gaussian_difference_is_the_mean_over_draws():
    z = 0.5 + math.hypot(0.6, 0.8) * torch.randn(
        400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    drawn = -F.logsigmoid(z)
    found = losses.gaussian_difference(of(0.5), of(0.6), of(0), of(0.8)).item()
    assert abs(found - drawn.mean().item()) < 4 * drawn.std().item() / math.sqrt(len(drawn))


def test_gaussian_difference_keeps_its_accuracy_for_wide_scores():
    fine = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-fine.square() / 2) / math.sqrt(2 * math.pi)
    exact = torch.trapezoid(F.softplus(-(1 + 10 * fine)) * density, fine).item()
    assert losses.gaussian_difference(of(1), of(6), of(0), of(8)).item() == pytest.approx(exact, rel=5e-3)


def test_first_token_weighs_the_verdict_alone():
    logp = of(-1, -2, -4).expand(3, 3).clone()
    logp[1, 2] = torch.nan  # padding
    found = losses.first_token(logp, torch.tensor([3, 2, 1]), 0.1)
    assert found.tolist() == pytest.approx([0.1 + 0.9 * 3, 0.1 + 0.9 * 2, 1.0])
    mean = losses.first_token(logp[:1], torch.tensor([3]), 1 / 3)
    assert mean.item() == pytest.approx(7 / 3)


def test_kl_of_a_latent_user():
    assert losses.standard_normal_kl(of(1)[:, None], of(0)[:, None]).item() == 0.5
    assert losses.standard_normal_kl(of(0)[:, None], of(1)[:, None]).item() == pytest.approx((math.e - 2) / 2)
    assert losses.standard_normal_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_hinge_of_a_discriminator():
    assert losses.hinge(of(0, 1, 2), of(0, -1, 1)).tolist() == [1.0, 0.0, 1.0]
