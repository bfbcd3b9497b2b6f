"""Losses on flow-matching errors and the divergence mask: exact numbers, optima, and transcriptions of peers' code."""

from __future__ import annotations

import math

import pytest
import torch
from test_losses import both_media, draw, gradient, numbers
from torch import Tensor

from align.maths import matching
from align.maths.losses import masked_pg, mse
from align.maths.matching import crd, dgpo, fm_logp, group_mean, implicit_reward

ALL = torch.ones(1, 2, dtype=torch.bool)

# -- log-probabilities of errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weighting", "value", "slope"),
    [  # at e = 0.25, t = 0.5
        ("uniform", -0.25, -1.0),
        ("t", -0.125, -0.5),
        ("t2", -0.0625, -0.25),
        ("huber", -0.5 * (math.sqrt(0.25 + 1e-10) - 1e-5), -0.5),
        ("ghuber", -2 * (math.sqrt(0.5) - 10**-2.5), -math.sqrt(2)),  # e^(1/4) = 1/sqrt 2; t e^(-3/4) = sqrt 2
    ],
)
def test_log_probability_of_an_error(weighting, value, slope):
    error = numbers(0.25, 0.0).requires_grad_()
    logp = fm_logp(error, numbers(0.5, 0.5), weighting)
    assert logp.tolist() == pytest.approx([value, 0], abs=1e-9)
    assert float(gradient(logp[:1], error)[0]) == pytest.approx(slope, abs=1e-6)


def test_ghuber_has_the_other_weightings_as_cases():
    error, t = numbers(0.1, 0.7, 2.0), numbers(0.3, 0.6, 1.0)
    torch.testing.assert_close(fm_logp(error, t, "ghuber", 1.0), fm_logp(error, t, "t"))
    torch.testing.assert_close(fm_logp(error, t, "ghuber", 0.5), 2 * fm_logp(error, t, "huber"))
    with pytest.raises(ValueError, match="'cubic'"):
        fm_logp(error, t, "cubic")  # type: ignore[arg-type]


# -- DGPO ---------------------------------------------------------------------------------------------------------


def test_dgpo_of_two_samples():
    """beta mean A (e - e_ref) = 10 (0.1 + 0.1) / 2 = 1; gate = 0.7310586; gate (0.5 - 0.3) / 2 = 0.07310586."""
    error = numbers(0.5, 0.3)[None].requires_grad_()
    loss = dgpo(error, numbers(0.4, 0.4)[None], numbers(1, -1)[None], ALL, 10.0)
    assert float(loss.metrics["gate"]) == pytest.approx(0.7310585786300049, abs=1e-15)
    assert float(loss.value.detach()) == pytest.approx(0.07310585786300049, abs=1e-15)
    assert gradient(loss.value, error).tolist() == [pytest.approx([0.3655292893150024, -0.3655292893150024])]
    assert not loss.metrics["clipped"].any()


@pytest.mark.parametrize(
    ("advantage", "old", "clipped"),
    [(1.0, 0.6, True), (1.0, 0.4, False), (-1.0, 0.4, True), (-1.0, 0.6, False), (1.0, 0.54, False)],
)
def test_dgpo_holds_only_what_already_moved_the_right_way(advantage, old, clipped):
    """Clip 0.05: exp(0.6 - 0.5) = 1.105, exp(0.4 - 0.5) = 0.905, exp(0.54 - 0.5) = 1.041. The value does not change."""
    error, a = numbers(0.5, 0.3)[None].requires_grad_(), numbers(advantage, -advantage)[None]
    plain = dgpo(error, error, a, ALL, 10.0)
    loss = dgpo(error, error, a, ALL, 10.0, error_old=numbers(old, 0.3)[None], clip=0.05)
    assert torch.equal(loss.value, plain.value)
    slope, before = gradient(loss.value, error)[0], gradient(plain.value, error)[0]
    assert slope.tolist() == [0.0 if clipped else float(before[0]), float(before[1])]
    assert float(loss.metrics["clipped"]) == clipped / 2


def test_dgpo_closes_its_gate_as_the_good_samples_are_preferred():
    a, ref = numbers(1, -1)[None], numbers(0.4, 0.4)[None]
    gates = [float(dgpo(numbers(0.4 - s, 0.4 + s)[None], ref, a, ALL, 50.0).metrics["gate"]) for s in (-0.1, 0, 0.1)]
    assert gates == pytest.approx([1 / (1 + math.exp(-5)), 0.5, 1 / (1 + math.exp(5))])


def peers_dgpo(model_v, ref_v, target, advantage, group, beta, size, old_v, clip) -> Tensor:
    """Luo-Yihong/DGPO on one process, transcribed: the errors, the clip, the sums by group, the mean over samples."""
    count = len(model_v)
    dsm = (target - model_v).square().reshape(count, -1).mean(1)
    ref = (target - ref_v).square().reshape(count, -1).mean(1)
    old = (target - old_v).square().reshape(count, -1).mean(1)
    ratio = torch.exp(-dsm + old)
    held = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    dsm = torch.where(held, dsm.detach(), dsm)
    sums = torch.zeros(int(group.max()) + 1, dtype=dsm.dtype)
    sums.scatter_add_(0, group, advantage * beta * (dsm.detach() - ref) / size)
    return (torch.sigmoid(sums)[group].detach() * advantage * dsm).mean()


@both_media
def test_dgpo_is_its_authors(shape):
    v, old, ref, target = (draw(shape, seed) for seed in range(4))
    old = v + 0.05 * old
    v.requires_grad_()
    advantage, group = draw((6,), 5), torch.arange(6) // 3
    theirs = peers_dgpo(v, ref, target, advantage, group, 3.0, 3, old, 0.02)
    errors = [mse(each, target).reshape(2, 3) for each in (v, ref, old)]
    valid = torch.ones(2, 3, dtype=torch.bool)
    ours = dgpo(*errors[:2], advantage.reshape(2, 3), valid, 3.0, error_old=errors[2], clip=0.02)
    assert 0 < float(ours.metrics["clipped"].mean()) < 1
    torch.testing.assert_close(ours.value.mean(), theirs)
    torch.testing.assert_close(gradient(ours.value.mean(), v), gradient(theirs, v))


def test_dgpo_with_a_clip_needs_the_old_errors():
    with pytest.raises(ValueError, match="error_old"):
        dgpo(numbers(1, 2)[None], numbers(1, 2)[None], numbers(1, 2)[None], ALL, 1.0, clip=0.1)


# -- centred reward distillation ----------------------------------------------------------------------------------


@both_media
def test_implicit_reward(shape):
    v, old, target = draw(shape).requires_grad_(), draw(shape, 1), draw(shape, 2)
    plain = implicit_reward(v, old, target, adaptive=False)
    torch.testing.assert_close(plain, mse(old, target) - mse(v, target))
    sizes = [(u - target).abs().flatten(1).mean(1) for u in (old, v.detach())]
    torch.testing.assert_close(implicit_reward(v, old, target), mse(old, target) / sizes[0] - mse(v, target) / sizes[1])
    assert not implicit_reward(v, v, target).any()
    after = v + 0.1 * gradient(plain, v)
    assert (mse(after, target) < mse(v, target)).all()


def test_crd_of_two_samples():
    """beta = 2: d = 2 (0.3 - 0.2), 2 (0.1 - 0.2) = +-0.2; R = +-0.3; (0.2 - 0.3)^2 = 0.01; slope 2 beta (d - R) / 2."""
    implicit = numbers(0.3, 0.1)[None].requires_grad_()
    loss = crd(implicit, numbers(0.8, 0.2)[None], ALL, 2.0)
    assert float(loss.value.detach()) == pytest.approx(0.01)
    assert gradient(loss.value, implicit).tolist() == [pytest.approx([-0.2, 0.2])]
    assert float(loss.metrics["implicit_spread"]) == pytest.approx(0.1)


def test_crd_with_cross_entropy_of_two_samples():
    """log(1 + e^-d) - (1 - s) (-d) for d = +-0.2, s = sigmoid(+-0.3): both samples cost the same."""
    implicit = numbers(0.3, 0.1)[None].requires_grad_()
    loss = crd(implicit, numbers(0.8, 0.2)[None], ALL, 2.0, kind="bce")
    s = 1 / (1 + math.exp(-0.3))
    assert float(loss.value.detach()) == pytest.approx(math.log1p(math.exp(-0.2)) + (1 - s) * 0.2)
    slope = 2 * (1 / (1 + math.exp(-0.2)) - s) / 2
    assert gradient(loss.value, implicit).tolist() == [pytest.approx([slope, -slope])]


def test_crd_is_zero_where_implicit_rewards_are_the_exact_log_ratios():
    """p_old = N(0, 1), reward a x, policy N(a / beta, 1): log-ratio (a x - a^2 / (2 beta)) / beta explains them all."""
    a, beta, x = 0.7, 0.4, draw((50, 8))
    exact = (a * x - a**2 / (2 * beta)) / beta
    valid = torch.ones(50, 8, dtype=torch.bool)
    for temperature in (None, 0.0, 0.5):
        assert float(crd(exact, a * x, valid, beta, temperature=temperature).value.max()) < 1e-24
    assert float(crd(1.1 * exact, a * x, valid, beta).value.mean()) > 1e-3


def test_crd_at_temperature_zero_centres_at_the_best_and_at_the_worst():
    """Rewards 0, 1, 1, implicit 0: R = -1, 0, 0 at the best (1, twice), 0, 1, 1 at the worst; (1/3 + 2/3) / 2."""
    reward, implicit = numbers(0, 1, 1)[None], numbers(0, 0, 0)[None]
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert float(crd(implicit, reward, valid, 1.0, temperature=0.0).value) == pytest.approx(0.5)
    torch.testing.assert_close(
        crd(implicit, reward, valid, 1.0, temperature=1e-4).value, numbers(0.5), rtol=1e-6, atol=0
    )
    uniform = crd(implicit, reward, valid, 1.0, temperature=1e6).value
    torch.testing.assert_close(uniform, crd(implicit, reward, valid, 1.0).value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_crd_is_its_authors_on_a_batch_of_one_prompt(kind, temperature):
    """Flow-Factory's ``_compute_crd_loss``, transcribed."""
    implicit, a = draw((1, 7)).requires_grad_(), draw((1, 7), 1).sigmoid()
    beta, r = 1.7, implicit[0]

    def direction(p: Tensor) -> Tensor:
        rc, found = a[0] - (a[0] * p).sum(), r - (r * p).sum().detach()
        if kind == "bce":
            return torch.nn.functional.binary_cross_entropy_with_logits(beta * found, torch.sigmoid(rc))
        return ((beta * found - rc) ** 2).mean()

    if temperature is None:
        theirs = direction(torch.full((7,), 1 / 7, dtype=torch.double))
    else:
        theirs = sum(0.5 * direction(torch.softmax(sign * a[0] / temperature, 0)) for sign in (1, -1))
    ours = crd(implicit, a, torch.ones(1, 7, dtype=torch.bool), beta, kind=kind, temperature=temperature).value
    torch.testing.assert_close(ours[0], theirs)
    torch.testing.assert_close(gradient(ours, implicit), gradient(theirs, implicit))


# -- samples without a score --------------------------------------------------------------------------------------


def test_samples_that_are_not_valid_count_nowhere():
    valid = torch.tensor([[True, True, True, False]] * 2)
    error, ref, a = draw((2, 4)).abs().requires_grad_(), draw((2, 4), 1).abs(), draw((2, 4), 2)
    for four, three in (
        (dgpo(error, ref, a, valid, 3.0), dgpo(error[:, :3], ref[:, :3], a[:, :3], valid[:, :3], 3.0)),
        (crd(error, a, valid, 3.0), crd(error[:, :3], a[:, :3], valid[:, :3], 3.0)),
        (
            crd(error, a, valid, 3.0, kind="bce", temperature=0.0),
            crd(error[:, :3], a[:, :3], valid[:, :3], 3.0, kind="bce", temperature=0.0),
        ),
    ):
        torch.testing.assert_close(four.value, three.value)
        assert not gradient(four.value, error)[:, 3].any()
    none = torch.zeros(2, 4, dtype=torch.bool)
    for loss in (dgpo(error, ref, a, none, 3.0), crd(error, a, none, 3.0), crd(error, a, none, 1.0, temperature=0.0)):
        assert not loss.value.any()
        assert not gradient(loss.value, error).any()
    assert group_mean(numbers(1, 2, 6, 9)[None], valid[:1]).tolist() == [3.0]


# -- divergence mask ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "divergence", "masked"),
    [
        (2.0, 0.5, 2e-5, True),  # good, likelier and far
        (2.0, 0.5, 1e-5, True),  # at the threshold
        (2.0, 0.5, 9e-6, False),  # near
        (2.0, -0.5, 2e-5, False),  # far, but on its way back
        (-2.0, -0.5, 2e-5, True),
        (-2.0, 0.5, 2e-5, False),
        (0.0, 0.5, 2e-5, False),
    ],
)
def test_the_mask_takes_what_is_far_and_moves_away(advantage, log_ratio, divergence, masked):
    logp = numbers(log_ratio).requires_grad_()
    loss = masked_pg(logp, numbers(0.0), numbers(advantage), numbers(divergence), 1e-5)
    plain = -advantage * math.exp(log_ratio)
    assert float(loss.value.detach()) == pytest.approx(0 if masked else plain)
    assert float(gradient(loss.value, logp)) == pytest.approx(0 if masked else plain)
    assert bool(loss.metrics["masked_good"]) is (masked and advantage > 0)
    assert bool(loss.metrics["masked_bad"]) is (masked and advantage < 0)
    assert float(loss.metrics["divergence"]) == divergence


def test_times_of_comparison_above_the_next_step() -> None:
    grid = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    low = matching.next_time(torch.tensor([1.0, 0.5, 0.25]), grid)
    assert low.tolist() == [0.75, 0.25, 0.0]
    span = (0.02, 0.98)
    ends = [matching.above(torch.full((3,), end), span, low).tolist() for end in span]
    assert ends == [pytest.approx([0.75, 0.25, 0.02]), pytest.approx([0.98] * 3)]
    middle = matching.above(torch.full((3,), 0.5), span, low)
    torch.testing.assert_close(middle, torch.tensor([0.865, 0.615, 0.5]))
    assert matching.next_time(torch.tensor([1.0]), torch.tensor([1.0, 0.0])).tolist() == [0.0]  # a student of one step
