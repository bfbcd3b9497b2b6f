"""Losses against closed forms: fixed points, signs, exact optima, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.maths.losses import (
    Guard,
    clipped_pg,
    dmd,
    kl_mean,
    mse,
    nft,
    pair_pref,
    rdp,
    reward_backprop,
    weighted_fm,
    x0_from,
    x_at,
)
from align.maths.samplers import step
from align.maths.statistics import mean, standard_error
from align.maths.weights import softmax_weight

SHAPES = [(6, 3, 4, 4), (6, 3, 5, 2, 2)]
SOME = settings(max_examples=40, deadline=None)
both_media = pytest.mark.parametrize("shape", SHAPES)


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    (got,) = torch.autograd.grad(value.sum(), of, retain_graph=True)
    return got


# -- the forward process ------------------------------------------------------------------------------------------


@both_media
def test_forward_process_and_back(shape):
    x0, eps, t = draw(shape), draw(shape, 1), torch.linspace(0, 1, 6, dtype=torch.double)
    x_t = x_at(x0, eps, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[5], eps[5])
    torch.testing.assert_close(x0_from(x_t, eps - x0, t), x0)


@both_media
def test_mse_is_per_row_and_in_float32(shape):
    a, b = draw(shape), draw(shape, 1)
    expected = torch.stack([((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(mse(a, b), expected)
    tiny = mse(torch.full(shape, 1e-5).half(), torch.zeros(shape).half())
    assert tiny.dtype == torch.float32
    torch.testing.assert_close(tiny, torch.full((6,), 1e-10), rtol=0.02, atol=0)


# -- policy gradient ----------------------------------------------------------------------------------------------


def test_on_policy_ratio_is_one_and_the_gradient_minus_a_grad_logp():
    logp = draw((5,)).requires_grad_()
    advantage = numbers(2, -1, 0, 0.5, -3)
    loss = clipped_pg(logp, logp.detach(), advantage, 1e-4)
    assert torch.equal(loss.metrics["ratio"], torch.ones(5, dtype=torch.double))
    assert torch.equal(loss.value, -advantage)
    assert torch.equal(gradient(loss.value, logp), -advantage)
    assert not loss.metrics["clipped"].any()


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "value", "clipped"),
    [
        (2.0, 0.5, -2.2, True),  # good and already likelier: held at 1 + clip
        (2.0, -0.5, -2 * math.exp(-0.5), False),
        (-2.0, -0.5, 1.8, True),  # bad and already unlikelier: held at 1 - clip
        (-2.0, 0.5, 2 * math.exp(0.5), False),
    ],
)
def test_the_clip_holds_only_what_already_moved_the_right_way(advantage, log_ratio, value, clipped):
    logp = numbers(log_ratio).requires_grad_()
    loss = clipped_pg(logp, numbers(0.0), numbers(advantage), 0.1)
    assert float(loss.value.detach()) == pytest.approx(value)
    assert bool(loss.metrics["clipped"]) is clipped
    assert (float(gradient(loss.value, logp)) == 0) is clipped


def test_zero_advantage_has_zero_gradient():
    logp = draw((6,)).requires_grad_()
    loss = clipped_pg(logp, draw((6,), 1), torch.zeros(6, dtype=torch.double), 0.1)
    assert not gradient(loss.value, logp).any()


def guarded(count: int, shift: float, x_next: Tensor | None = None) -> tuple[Tensor, Tensor, Guard]:
    """Log-probabilities of ``count`` steps drawn under one velocity, under another ``shift`` away, and their Guard."""
    x, v, z = (draw((count, 2, 2, 2), seed) for seed in range(3))
    t, u = numbers(0.6, 0.5)
    old = step("flow_sde", x, v, t, u, noise_level=0.7, noise=z)
    new = step("flow_sde", x, v + shift, t, u, noise_level=0.7, x_next=old.x)
    return new.logp, old.logp, Guard(new.mean, old.mean, new.std, (u - t).expand(count))


def test_guard_centres_the_log_ratio_under_the_old_policy():
    count = 20_000
    logp, logp_old, guard = guarded(count, 1.0)
    plain = (logp - logp_old).mean()
    log_ratio = clipped_pg(logp, logp_old, torch.ones(count), 0.1, guard=guard).metrics["ratio"].log()
    step_of_mean = float(mse(guard.mean, guard.mean_old).mean()) ** 0.5
    assert float(plain) == pytest.approx(-(step_of_mean**2) / (2 * float(guard.std[0]) ** 2), rel=0.1)
    spread = step_of_mean / math.sqrt(8)  # of mean z (mu - mu_old) over 8 dimensions: S has dropped out
    assert float(log_ratio.mean()) == pytest.approx(0, abs=4 * spread / math.sqrt(count))
    assert float(log_ratio.std()) == pytest.approx(spread, rel=0.03)


def test_guards_bias_is_each_samples_own():
    logp, logp_old, guard = guarded(6, 1.0)
    moved = guard.mean.clone()
    moved[3] += 1.0
    one, other = (
        clipped_pg(logp, logp_old, torch.ones(6), 10.0, guard=Guard(mean, guard.mean_old, guard.std, guard.dt))
        for mean in (guard.mean, moved)
    )
    changed = (one.value != other.value).tolist()
    assert changed == [False, False, False, True, False, False]


def test_guards_formula():
    logp, logp_old, guard = guarded(6, 0.3)
    advantage, dims = draw((6,), 7), 8
    bias = (guard.mean - guard.mean_old).flatten(1).square().sum(1) / dims / (2 * guard.std**2)
    ratio = torch.exp((logp - logp_old + bias) * guard.std)
    expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.99, 1.01)) / 0.1
    torch.testing.assert_close(clipped_pg(logp, logp_old, advantage, 0.01, guard=guard).value, expected)


@both_media
def test_kl_of_a_step_is_the_gaussians(shape):
    mean, mean_ref, std = draw(shape).requires_grad_(), draw(shape, 1), torch.linspace(0.1, 2, 6, dtype=torch.double)
    wide = std.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    normal = torch.distributions.Normal
    true = torch.distributions.kl_divergence(normal(mean, wide), normal(mean_ref, wide)).flatten(1).mean(1)
    torch.testing.assert_close(kl_mean(mean, mean_ref, std), true)
    assert kl_mean(mean, mean_ref, std).requires_grad


def test_a_step_without_noise_harms_no_loss():
    mean = draw((2, 3)).requires_grad_()
    std, zero = numbers(0, 0), numbers(0, 0)
    assert not kl_mean(mean, draw((2, 3), 1), std).any()
    guard = Guard(mean, draw((2, 3), 1), std, numbers(-0.1, -0.1))
    loss = clipped_pg(zero, zero, numbers(1, -1), 0.1, guard=guard)
    torch.testing.assert_close(loss.value, numbers(-10, 10))
    assert not gradient(loss.value, mean).any()


# -- DiffusionNFT -------------------------------------------------------------------------------------------------


def nft_case(shape: tuple[int, ...], beta: float, r: float, off_policy: float, adaptive: bool = True):
    """Everything about an NFT loss: (loss, v, v_old, target, t, x0)."""
    x0, eps, v_old = draw(shape), draw(shape, 1), draw(shape, 2)
    v = (v_old + off_policy * draw(shape, 3)).requires_grad_()
    t = torch.linspace(0.2, 0.9, len(x0), dtype=torch.double)
    probability = torch.full((len(x0),), r, dtype=torch.double)
    loss = nft(x0, x_at(x0, eps, t), t, v, v_old, probability, beta, adaptive=adaptive)
    return loss, v, v_old, eps - x0, t, x0


@both_media
def test_nft_is_flow_matching_for_certainly_good_samples(shape):
    loss, v, _, target, t, _ = nft_case(shape, 1.0, 1.0, 0.5)
    error = (v - target).detach()
    weight = t * error.abs().flatten(1).mean(1)
    torch.testing.assert_close(loss.value, 5 * t**2 * mse(v, target) / weight)
    plain = nft_case(shape, 1.0, 1.0, 0.5, adaptive=False)[0]
    torch.testing.assert_close(plain.value, 5 * t**2 * mse(v, target))


@both_media
@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_nft_teaches_nothing_where_it_does_not_know(shape, beta):
    """r = 1/2 at v = v_old: gradient 0; elsewhere a pull back to v_old."""
    loss, v, *_ = nft_case(shape, beta, 0.5, 0.0)
    assert gradient(loss.value, v).abs().max() < 1e-12
    assert not loss.metrics["contrast"].any()
    away, v, v_old, *_ = nft_case(shape, beta, 0.5, 0.5, adaptive=False)
    slope = gradient(away.value, v)
    assert ((slope * (v - v_old)).flatten(1).sum(1) > 0).all()
    torch.testing.assert_close(away.metrics["contrast"], mse(v.detach(), v_old))


@both_media
@pytest.mark.parametrize("r", [0.0, 0.3, 0.8, 1.0])
def test_nft_gradient_on_policy(shape, r):
    """Proportional to -(2 r - 1) (target - v_old), with the adaptive weights of both sides equal; beta drops out."""
    for beta in (0.5, 2.0):
        loss, v, v_old, target, t, _ = nft_case(shape, beta, r, 0.0)
        wide = t.reshape(-1, *[1] * (len(shape) - 1))
        weight = wide * (v_old - target).abs().flatten(1).mean(1).reshape(wide.shape)
        expected = -5 * 2 * wide**2 * (2 * r - 1) * (target - v_old) / weight / v_old[0].numel()
        torch.testing.assert_close(gradient(loss.value, v), expected)


def test_nft_optimum_of_one_sample():
    """v* = v_old + (2 r - 1) / beta (u - v_old): 1.16 for v_old = .2, u = 1, r = .8, beta = .5; found by Newton."""
    x0, eps, t = numbers(0.0)[:, None], numbers(1.0)[:, None], numbers(0.7)
    v = numbers(-3.0)[:, None].requires_grad_()
    loss = nft(x0, x_at(x0, eps, t), t, v, numbers(0.2)[:, None], numbers(0.8), 0.5, adaptive=False)
    (slope,) = torch.autograd.grad(loss.value.sum(), v, create_graph=True)
    assert float((v - slope / gradient(slope, v)).detach()) == pytest.approx(1.16, abs=1e-12)


def test_nft_goes_towards_good_and_away_from_bad():
    for r, sign in [(0.9, 1), (0.1, -1)]:
        loss, v, _, target, *_ = nft_case(SHAPES[0], 1.0, r, 0.0)
        after = v - 0.1 * gradient(loss.value, v)
        assert (sign * (mse(v, target) - mse(after, target)) > 0).all()


def test_nft_has_no_gradient_to_old():
    x0, eps, t = draw((2, 3)), draw((2, 3), 1), numbers(0.4, 0.6)
    v, v_old = draw((2, 3), 2).requires_grad_(), draw((2, 3), 3).requires_grad_()
    nft(x0, x_at(x0, eps, t), t, v, v_old, numbers(0.2, 0.9), 1.0).value.sum().backward()
    assert v_old.grad is None
    assert v.grad is not None
    assert v.grad.any()


# -- weighted regression ------------------------------------------------------------------------------------------


@both_media
def test_weighted_fm_is_linear_in_the_weight(shape):
    v, x0, eps, w = draw(shape), draw(shape, 1), draw(shape, 2), draw((6,), 3)
    loss = weighted_fm(v, x0, eps, w)
    torch.testing.assert_close(loss.value, w * loss.metrics["fm"])
    torch.testing.assert_close(loss.metrics["fm"], mse(v + x0, eps))
    torch.testing.assert_close(weighted_fm(v, x0, eps, 3 * w).value, 3 * loss.value)


def test_reward_weighting_tilts_a_gaussian():
    """N(0, 1) with reward a x, weights exp(r / beta): the velocity fitted at t = 1 is -mean = -a / beta."""
    x0 = draw((200_000, 1))
    weight = softmax_weight(0.5 * x0[:, 0], torch.zeros(len(x0), dtype=torch.long), temperature=1.0).double()
    assert float(weight.mean()) == pytest.approx(1)
    v = numbers(0.0).requires_grad_()
    loss = weighted_fm(v.expand(len(x0), 1), x0, torch.zeros_like(x0), weight).value.mean()
    (slope,) = torch.autograd.grad(loss, v)
    optimum = -float(slope) / 2  # of the mean of weight (v + x0)^2 when weights average 1
    assert optimum == pytest.approx(-0.5, abs=0.012)


# -- reward gradients ---------------------------------------------------------------------------------------------


def test_reward_gradients_are_means_over_the_copies_that_have_a_reward():
    rewards = torch.tensor([[1.0, 3.0, 0.0], [0.5, 9.0, 0.0]], dtype=torch.double, requires_grad=True)
    known = torch.tensor([[True, True, False], [True, False, False]])
    loss = reward_backprop(rewards, known, scale=2.0).value
    assert loss.tolist() == [-1.5, -6.0, 0.0]
    assert gradient(loss, rewards).tolist() == [[-1.0, -2.0, 0.0], [-1.0, 0.0, 0.0]]


def test_a_margin_ends_the_gradient_of_rewards_above_it():
    rewards = torch.tensor([[1.0, 3.0]], dtype=torch.double, requires_grad=True)
    loss = reward_backprop(rewards, torch.ones(1, 2, dtype=torch.bool), margin=2.0, scale=1e-3).value
    assert loss.tolist() == [1e-3, 0.0]
    assert gradient(loss, rewards).tolist() == [[-1e-3, 0.0]]


# -- distribution matching ----------------------------------------------------------------------------------------


@both_media
def test_the_gradient_of_dmd_is_the_normalised_difference_over_the_dimensions(shape):
    x, real, fake = draw(shape).requires_grad_(), draw(shape, 1), draw(shape, 2)
    weight = torch.arange(1.0, 7.0, dtype=torch.double)
    loss = dmd(x, real, fake, weight)
    scale = (x.detach() - real).abs().flatten(1).mean(1)
    g = (fake - real) / scale.reshape(-1, *[1] * (len(shape) - 1))
    expected = weight.reshape(-1, *[1] * (len(shape) - 1)) * g / x[0].numel()
    torch.testing.assert_close(gradient(loss.value, x), expected)
    torch.testing.assert_close(loss.value.detach(), weight * g.square().flatten(1).mean(1) / 2)
    torch.testing.assert_close(loss.metrics["mismatch"], g.abs().flatten(1).mean(1))


def test_dmd_is_still_where_critic_and_teacher_agree():
    x, real = draw((6, 3, 4, 4)).requires_grad_(), draw((6, 3, 4, 4), 1)
    loss = dmd(x, real, real)
    assert torch.equal(loss.value, torch.zeros(6, dtype=torch.double))
    assert torch.equal(gradient(loss.value, x), torch.zeros_like(x))


def test_a_reward_half_higher_weighs_e_times_as_much_at_beta_two():
    x, real, fake = draw((2, 8)), draw((2, 8), 1), draw((2, 8), 2)
    x, real, fake = (part[:1].repeat(2, 1) for part in (x, real, fake))
    loss = dmd(x, real, fake, (2 * numbers(1.0, 0.5)).exp())
    assert float(loss.value[0] / loss.value[1]) == pytest.approx(2.718281828, rel=1e-9)


def test_dmd_leaves_the_student_unmoved_by_the_teachers_graph():
    x, real, fake = (draw((2, 8), seed).requires_grad_() for seed in range(3))
    dmd(x, real, fake).value.sum().backward()
    assert real.grad is None
    assert fake.grad is None


# -- preferences --------------------------------------------------------------------------------------------------

errors = st.lists(st.floats(0, 2), min_size=4, max_size=4)


def test_agreeing_with_the_reference_costs_log_two():
    loss = pair_pref(numbers(0.3, 0.9), numbers(0.5, 0.1), numbers(0.3, 0.9), numbers(0.5, 0.1), 500.0)
    torch.testing.assert_close(loss.value, numbers(math.log(2), math.log(2)))
    assert torch.equal(loss.metrics["accuracy"], numbers(0.5, 0.5))
    weighted = pair_pref(numbers(0.3), numbers(0.5), numbers(0.3), numbers(0.5), 500.0, weight=numbers(3))
    torch.testing.assert_close(weighted.value, numbers(3 * math.log(2)))


@SOME
@given(errors, st.floats(0.1, 10))
def test_a_pair_and_its_swap_cost_two_log_two_at_least(values, beta):
    w, loser, ref_w, ref_l = (numbers(value) for value in values)
    there, back = pair_pref(w, loser, ref_w, ref_l, beta), pair_pref(loser, w, ref_l, ref_w, beta)
    total, margin = float(there.value + back.value), float(there.metrics["margin"])
    assert total >= 2 * math.log(2) - 1e-12
    assert total == pytest.approx(2 * math.log(2 * math.cosh(margin / 2)), abs=1e-9)  # equal only at margin 0
    assert float(there.metrics["margin"]) == pytest.approx(-float(back.metrics["margin"]))


def test_preference_value_and_metrics():
    loss = pair_pref(numbers(0.1), numbers(0.4), numbers(0.3), numbers(0.2), 2.0)
    assert float(loss.value) == pytest.approx(math.log1p(math.exp(-0.4)))  # D = -0.3 - 0.1
    assert float(loss.metrics["margin"]) == pytest.approx(0.4)
    assert float(loss.metrics["accuracy"]) == 1
    worse = pair_pref(numbers(0.4), numbers(0.1), numbers(0.2), numbers(0.3), 2.0)
    assert float(worse.metrics["accuracy"]) == 0


def test_preference_gradient_lowers_the_winners_error():
    w, loser = numbers(0.3).requires_grad_(), numbers(0.3).requires_grad_()
    loss = pair_pref(w, loser, numbers(0.3), numbers(0.3), 8.0).value
    assert float(gradient(loss, w)) == pytest.approx(2)  # beta / 4 at the reference
    assert float(gradient(loss, loser)) == pytest.approx(-2)


@SOME
@given(errors, st.floats(0, 1))
def test_a_soft_label_mixes_the_two_orders(values, y):
    w, loser, ref_w, ref_l = (numbers(value) for value in values)
    mixed = pair_pref(w, loser, ref_w, ref_l, 3.0, label=y).value
    there, back = pair_pref(w, loser, ref_w, ref_l, 3.0).value, pair_pref(loser, w, ref_l, ref_w, 3.0).value
    torch.testing.assert_close(mixed, y * there + (1 - y) * back)


# -- reward difference prediction ---------------------------------------------------------------------------------


def test_rdp_at_the_reference_is_the_reward_difference():
    zero = torch.zeros(1, 5, dtype=torch.double)
    assert float(rdp(zero, zero, numbers(1.0), 0.5).value) == 4


def test_rdp_is_zero_at_the_optimum():
    """pi_ref = N(0, 1), reward a x, policy N(a / beta, 1): the log-ratio explains every difference of rewards."""
    a, beta = 0.7, 0.4
    x, y = draw((1000, 1)), draw((1000, 1), 1)

    def log_ratio(z: Tensor) -> Tensor:
        return a / beta * z - a**2 / (2 * beta**2)

    exact = rdp(log_ratio(x), log_ratio(y), (a * (x - y)).flatten(), beta)
    assert float(exact.value.max()) < 1e-28
    assert float(exact.value.mean().sqrt()) < 2e-15
    wrong = rdp(1.1 * log_ratio(x), 1.1 * log_ratio(y), (a * (x - y)).flatten(), beta)
    assert float(wrong.value.mean()) > 0.01


def test_rdp_does_not_care_which_is_first():
    a, b, gap = draw((6, 4)), draw((6, 4), 1), draw((6,), 2)
    torch.testing.assert_close(rdp(a, b, gap, 0.3).value, rdp(b, a, -gap, 0.3).value)
    old = {"old_a": a + 0.1, "old_b": b - 0.1, "clip": 0.05}
    swapped = {"old_a": b - 0.1, "old_b": a + 0.1, "clip": 0.05}
    torch.testing.assert_close(rdp(a, b, gap, 0.3, **old).value, rdp(b, a, -gap, 0.3, **swapped).value)


def test_rdp_mean_over_steps_is_the_sum_with_beta_over_steps():
    a, b, gap = draw((6, 4)), draw((6, 4), 1), draw((6,), 2)
    mean, total = rdp(a, b, gap, 0.8, reduce="mean").value, rdp(a, b, gap, 0.2).value
    torch.testing.assert_close(16 * mean, total)


def test_rdp_clip_changes_nothing_on_policy():
    a, b, gap = draw((6, 4)).requires_grad_(), draw((6, 4), 1), draw((6,), 2)
    plain = rdp(a, b, gap, 0.5)
    near = rdp(a, b, gap, 0.5, old_a=a, old_b=b, clip=1e-4)
    assert torch.equal(near.value, plain.value)
    torch.testing.assert_close(gradient(near.value, a), gradient(plain.value, a))


def test_rdp_clip_stops_what_has_improved_enough_and_not_what_has_worsened():
    old, gap = torch.zeros(1, 4, dtype=torch.double), numbers(1.0)
    for shift, stopped in [(0.1, True), (-0.1, False)]:
        a = (old + shift).requires_grad_()
        loss = rdp(a, old, gap, 0.5, old_a=old, old_b=old, clip=0.01)
        assert (not gradient(loss.value, a).any()) is stopped
        assert bool(loss.metrics["clipped"]) is stopped
        assert float(loss.value.detach()) == pytest.approx((0.04 - 2) ** 2 if stopped else (-0.4 - 2) ** 2)


def test_rdp_clip_needs_the_old_log_ratios():
    zero = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="old_a and old_b"):
        rdp(zero, zero, zero[:, 0], 0.5, clip=0.1)


# -- what holds for all -------------------------------------------------------------------------------------------


def every_loss(rows: Tensor) -> dict[str, Tensor]:
    """All losses on the same eight samples, in the order ``rows``."""
    shape = (8, 3, 2, 2)
    a, b, c, d = (draw(shape, seed)[rows] for seed in range(4))
    t, n, k = (draw((8,), 10)[rows].sigmoid(), draw((8,), 11)[rows], draw((8, 3), 12)[rows])
    std, dt = t + 0.1, -t
    return {
        "clipped_pg": clipped_pg(n, n + 0.1 * t, a[:, 0, 0, 0], 0.05).value,
        "guard": clipped_pg(n, n + 0.1 * t, a[:, 0, 0, 0], 0.05, guard=Guard(a, b, std, dt)).value,
        "kl_mean": kl_mean(a, b, std),
        "nft": nft(a, b, t, c, d, t, 0.5).value,
        "weighted_fm": weighted_fm(a, b, c, n).value,
        "pair_pref": pair_pref(mse(a, b), mse(a, c), mse(b, c), mse(b, d), 2.0).value,
        "rdp": rdp(k, k.flip(1) * 2, n, 0.5, old_a=k + 0.1, old_b=k, clip=0.05).value,
    }


def test_terms_do_not_see_each_other():
    """A permuted, doubled batch gives the permuted, doubled terms: chunks and processes cannot change a loss."""
    rows = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4, 3, 1])
    plain, mixed = every_loss(torch.arange(8)), every_loss(rows)
    for name, value in plain.items():
        assert value.shape == (8,), name
        torch.testing.assert_close(mixed[name], value[rows], msg=name)


def test_statistics_of_scores():
    """1, 2, 3, 4: mean 5/2, variance 5/3, standard error sqrt(5/12); too few values have none."""
    values = numbers(1.0, 2.0, 3.0, 4.0)
    assert mean(values) == 2.5
    assert standard_error(values) == pytest.approx(math.sqrt(5 / 12), abs=1e-15)
    assert mean(values[:1]) == 1.0
    assert math.isnan(standard_error(values[:1]))
    assert math.isnan(mean(values[:0]))
    assert math.isnan(standard_error(values[:0]))
