"""Sampling steps against published formulas, exact marginals and torch.distributions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from align.maths.losses import x0_from
from align.maths.samplers import KINDS, STOCHASTIC, sample, step

IMAGE, VIDEO = (4, 3, 4, 4), (4, 3, 5, 2, 2)
M, S = 0.5, 2.0  # the toy data set is N(M, S^2) in every dimension
SOME = settings(max_examples=40, deadline=None)
times_and_level = st.tuples(st.floats(0.05, 0.97), st.floats(0.05, 0.95), st.floats(0.05, 1.0))


def velocity_to(m: float, s: float):
    """The exact velocity field of data N(m, s^2)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) * (x - (1 - t) * m) / variance

    return velocity


def grid(count: int, first: float = 1.0, last: float = 0.0) -> Tensor:
    return torch.linspace(first, last, count + 1, dtype=torch.double)


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)


def moments(kind: str, count: int, level: float, m: float = M, s: float = S) -> list[tuple[float, float, float]]:
    """(t, mean, variance) after every step from N(0, 1), exact: a step is affine in x where the velocity is."""
    velocity, times = velocity_to(m, s), grid(count)
    x, mean, variance = torch.tensor([[0.0], [1.0]], dtype=torch.double), 0.0, 1.0
    out = []
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        made = step(kind, x, v, t, t_next, noise_level=level, t_second=float(times[1]), noise=torch.zeros_like(x))
        offset, slope = float(made.mean[0]), float(made.mean[1] - made.mean[0])
        mean, variance = offset + slope * mean, slope**2 * variance + float(made.std[0]) ** 2
        out.append((float(t_next), mean, variance))
    return out


# -- one step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.8), (0.6, 0.45), (0.1, 0.0)])
def test_without_noise_every_step_is_the_ode_step(kind, shape, t, t_next):
    x, v, z = (draw(shape, seed, torch.float32) for seed in range(3))
    made = step(kind, x, v, t, t_next, noise_level=0.0, t_second=0.8, noise=z)
    ode = step("ode", x, v, t, t_next)
    assert torch.equal(made.x, ode.x)
    torch.testing.assert_close(ode.x, x + (t_next - t) * v)
    assert not made.std.any()
    assert not made.logp.any()


@SOME
@given(times_and_level)
def test_published_formulas(drawn):
    t, share, a = drawn
    u = share * t
    dt = u - t
    x, v, z = (draw(IMAGE, seed) for seed in range(3))
    x0, eps = x - t * v, x + (1 - t) * v

    def close(kind: str, mean: Tensor, std: float) -> None:
        made = step(kind, x, v, t, u, noise_level=a, noise=z)
        torch.testing.assert_close(made.mean, mean)
        torch.testing.assert_close(made.std, torch.full((4,), std, dtype=torch.double))
        torch.testing.assert_close(made.x, mean + std * z)

    s = a * math.sqrt(t / (1 - t))
    flow = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    close("flow_sde", flow, s * math.sqrt(-dt))
    close("dance_sde", x + v * dt + a**2 / 2 * (x - (1 - t) * x0) / t**2 * dt, a * math.sqrt(-dt))
    s = u * math.sin(a * math.pi / 2)
    close("cps", (1 - u) * x0 + math.sqrt(u**2 - s**2) * eps, s)
    s = a * u * math.sqrt(1 - u**2 * (1 - t) ** 2 / (t**2 * (1 - u) ** 2))
    close("ddim", (1 - u) * x0 + math.sqrt(u**2 - s**2) * eps, s)


def test_dance_sde_is_flow_sde_with_constant_s():
    x, v, z = (draw(IMAGE, seed) for seed in range(3))
    t, a = 0.7, 0.4
    dance = step("dance_sde", x, v, t, 0.5, noise_level=a, noise=z)
    flow = step("flow_sde", x, v, t, 0.5, noise_level=a * math.sqrt((1 - t) / t), noise=z)
    torch.testing.assert_close(dance.x, flow.x)
    torch.testing.assert_close(dance.logp, flow.logp)


def test_cps_at_one_renoises():
    x, v, z = (draw(VIDEO, seed) for seed in range(3))
    made = step("cps", x, v, 0.8, 0.6, noise_level=1.0, noise=z)
    torch.testing.assert_close(made.x, 0.4 * (x - 0.8 * v) + 0.6 * z)


@pytest.mark.parametrize("t", [1.0, 0.8, 0.2])
def test_ddim_with_eta_one_is_exact_with_level_root_two(t):
    x, v, z = (draw(IMAGE, seed) for seed in range(3))
    ddim = step("ddim", x, v, t, 0.1, noise_level=1.0, noise=z)
    exact = step("exact", x, v, t, 0.1, noise_level=math.sqrt(2), noise=z)
    torch.testing.assert_close(ddim.x, exact.x)
    torch.testing.assert_close(ddim.logp, exact.logp)


def test_exact_solves_flow_sde_with_x0_held():
    """Moments of the frozen equation by 4000 midpoint steps; variance 0.137373 for level 0.7 from 0.8 to 0.6."""
    a, t, end, x0, start, count = 0.7, 0.8, 0.6, 0.3, 0.9, 4000
    mean, variance, dt = start, 0.0, (end - t) / count

    def slopes(time: float, m: float, c: float) -> tuple[float, float]:
        s2 = a**2 * time / (1 - time)
        pull = 1 / time + s2 / (2 * time**2)  # drift = v + s^2 / (2 t) eps_hat, both linear in x when x0 is held
        return (m - x0) / time + s2 / (2 * time) * (m - (1 - time) * x0) / time, 2 * pull * c - s2

    for _ in range(count):
        dm, dc = slopes(t, mean, variance)
        dm, dc = slopes(t + dt / 2, mean + dm * dt / 2, variance + dc * dt / 2)
        mean, variance, t = mean + dm * dt, variance + dc * dt, t + dt
    x = torch.full((1, 1), start, dtype=torch.double)
    made = step("exact", x, (x - x0) / 0.8, 0.8, 0.6, noise_level=a, noise=x)
    assert float(made.std) ** 2 == pytest.approx(0.137373, abs=5e-7)
    assert float(made.std) ** 2 == pytest.approx(variance, abs=1e-7)
    assert float(made.mean) == pytest.approx(mean, abs=1e-7)


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_log_probability_is_the_gaussians(kind, shape):
    x, v, z = (draw(shape, seed) for seed in range(3))
    made = step(kind, x, v, 0.6, 0.5, noise_level=0.5, noise=z)
    std = made.std.reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)
    torch.testing.assert_close(made.logp, Normal(made.mean, std).log_prob(made.x).flatten(1).mean(1))


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_scoring_a_step_gives_back_its_log_probability_to_the_bit(kind):
    """Whatever the shape of the batch and of the time: the ratio of a first update is 1 exactly."""
    x, v, z = (draw((8, 3, 4, 4), seed, torch.float32) for seed in range(3))
    t, u = torch.tensor(0.7312), torch.tensor(0.6101)
    made = step(kind, x, v, t, u, noise_level=0.7, noise=z)
    again = step(kind, x, v, t.expand(8), u.expand(8), noise_level=0.7, x_next=made.x)
    one = step(kind, x[2:3], v[2:3], t[None], u[None], noise_level=0.7, x_next=made.x[2:3])
    assert torch.equal(again.logp, made.logp)
    assert torch.equal(one.logp, made.logp[2:3])
    assert made.x.dtype == torch.float32


def test_rows_have_times_of_their_own():
    x, v, z = (draw((3, 2, 2, 2), seed) for seed in range(3))
    t, u = torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.7, 0.4, 0.1])
    made = step("flow_sde", x, v, t, u, noise_level=0.7, noise=z)
    for n in range(3):
        rows = slice(n, n + 1)
        one = step("flow_sde", x[rows], v[rows], t[n], u[n], noise_level=0.7, noise=z[rows])
        torch.testing.assert_close(made.x[rows], one.x)
        torch.testing.assert_close(made.logp[rows], one.logp)


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_log_probability_has_the_score_functions_gradient(kind):
    """grad_v logp = (x' - mu) / S^2 * d mu / d v / dims, for a step just drawn as for one scored."""
    x, z = draw(IMAGE), draw(IMAGE, 1)
    v = draw(IMAGE, 2).requires_grad_()
    made = step(kind, x, v, 0.6, 0.4, noise_level=0.6, noise=z)
    (got,) = torch.autograd.grad(made.logp.sum(), v)
    slope = float((step(kind, x, v + 1, 0.6, 0.4, noise_level=0.6, noise=z).mean - made.mean).detach().mean())
    dims = x[0].numel()
    torch.testing.assert_close(got, (made.x - made.mean).detach() / made.std[0] ** 2 * slope / dims)
    assert got.abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["cps", "ddim", "exact"])
def test_last_step_of_the_rebuilding_kinds_is_clean(kind):
    x, z = draw(IMAGE), draw(IMAGE, 1)
    v = draw(IMAGE, 2).requires_grad_()
    made = step(kind, x, v, 0.2, 0.0, noise_level=0.7, noise=z)
    torch.testing.assert_close(made.x, x - 0.2 * v)
    assert not made.std.any()
    assert not made.logp.any()
    made.logp.sum().backward()
    assert v.grad is not None
    assert not v.grad.any()


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_last_step_of_the_sdes_adds_noise_as_published(kind):
    x, v, z = (draw(IMAGE, seed) for seed in range(3))
    made = step(kind, x, v, 0.2, 0.0, noise_level=0.7, noise=z)
    s = 0.7 * math.sqrt(0.2 / 0.8) if kind == "flow_sde" else 0.7
    torch.testing.assert_close(made.std, torch.full((4,), s * math.sqrt(0.2), dtype=torch.double))


def test_flow_sde_from_pure_noise_uses_the_second_time():
    x, v, z = (draw(IMAGE, seed) for seed in range(3))
    made = step("flow_sde", x, v, 1.0, 0.9, noise_level=0.7, t_second=0.9, noise=z)
    s = 0.7 * math.sqrt(1 / (1 - 0.9))
    torch.testing.assert_close(made.std, torch.full((4,), s * math.sqrt(0.1), dtype=torch.double))
    torch.testing.assert_close(made.mean, x * (1 - s**2 / 2 * 0.1) - v * 0.1)
    with pytest.raises(ValueError, match="t_second"):
        step("flow_sde", x, v, 1.0, 0.9, noise_level=0.7, noise=z)


def test_mistakes_are_named():
    x = draw(IMAGE)
    with pytest.raises(ValueError, match="ode, dpm2, flow_sde, dance_sde, cps, ddim, exact"):
        step("euler", x, x, 0.5, 0.4)
    with pytest.raises(ValueError, match="cps step needs noise"):
        step("cps", x, x, 0.5, 0.4, noise_level=0.5)
    for kind, level in [("cps", 1.1), ("ddim", 1.5), ("exact", -0.1), ("flow_sde", -1.0)]:
        with pytest.raises(ValueError, match=f"level of {kind}"):
            step(kind, x, x, 0.5, 0.4, noise_level=level, noise=x)


def test_a_single_deterministic_step_lands_on_x0():
    x, v = draw(IMAGE), draw(IMAGE, 1)
    for kind in KINDS[:2]:
        torch.testing.assert_close(step(kind, x, v, 0.7, 0.0).x, x0_from(x, v, torch.tensor(0.7)))


# -- second order -------------------------------------------------------------------------------------------------


@SOME
@given(st.floats(0.4, 0.95), st.floats(0.5, 0.95), st.floats(0.1, 0.95))
def test_dpm2_is_the_published_multistep_update(before, share, share_next):
    t = before * share
    u = t * share_next
    x, v, x0_before = (draw(IMAGE, seed) for seed in range(3))
    x0 = x - t * v
    clock = [math.log((1 - time) / time) for time in (before, t, u)]
    h_before, h = clock[1] - clock[0], clock[2] - clock[1]
    r = h_before / h
    blend = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
    expected = u / t * x - (1 - u) * math.expm1(-h) * blend
    torch.testing.assert_close(step("dpm2", x, v, t, u, previous=(before, x0_before)).x, expected)


@pytest.mark.parametrize(
    ("before", "t", "t_next"), [(None, 1.0, 0.9), (1.0, 0.9, 0.8), (0.2, 0.1, 0.0), (1.0, 0.5, 0.0)]
)
def test_dpm2_is_first_order_where_its_clock_is_infinite(before, t, t_next):
    x, v, x0_before = (draw(IMAGE, seed) for seed in range(3))
    previous = None if before is None else (before, x0_before)
    made = step("dpm2", x, v, t, t_next, previous=previous)
    torch.testing.assert_close(made.x, step("ode", x, v, t, t_next).x)
    assert not made.logp.any()


def endpoint_error(kind: str, count: int, first: float, last: float) -> float:
    def at(t: float, z: Tensor) -> Tensor:
        return (1 - t) * M + math.sqrt((1 - t) ** 2 * S**2 + t**2) * z

    z = draw((8, 3, 2, 2))
    x, _ = sample(velocity_to(M, S), at(first, z), grid(count, first, last), kind=kind)
    return float((x - at(last, z)).abs().max())


def test_orders_of_convergence():
    """Halving the step divides the error by 2 for the ODE step and by 4 for dpm2."""
    euler = [endpoint_error("ode", count, 0.9, 0.1) for count in (40, 80)]
    second = [endpoint_error("dpm2", count, 0.9, 0.1) for count in (40, 80)]
    assert euler[0] / euler[1] == pytest.approx(2, rel=0.1)
    assert second[0] / second[1] == pytest.approx(4, rel=0.1)


def test_the_ode_carries_noise_to_m_plus_s_noise():
    """From pure noise to data; dpm2 gets there in far fewer steps."""
    assert endpoint_error("ode", 1000, 1.0, 0.0) < 0.01
    for count in (10, 20, 40):
        assert endpoint_error("dpm2", count, 1.0, 0.0) < 0.3 * endpoint_error("ode", count, 1.0, 0.0)
    assert endpoint_error("dpm2", 80, 1.0, 0.0) > 3 * endpoint_error("dpm2", 160, 1.0, 0.0)


# -- marginals ----------------------------------------------------------------------------------------------------


def test_flow_sde_keeps_the_marginal():
    _, mean, variance = moments("flow_sde", 400, 0.7)[-1]
    assert mean == pytest.approx(M, abs=1e-9)
    assert math.sqrt(variance) == pytest.approx(2.010, abs=1e-3)


@pytest.mark.parametrize("kind", ["dance_sde", "ddim", "exact"])
def test_the_other_kinds_converge_to_the_data(kind):
    errors = [abs(moments(kind, count, 0.7)[-1][2] - S**2) for count in (100, 400)]
    assert errors[1] < 0.35 * errors[0]
    assert errors[1] < 0.06


def test_cps_does_not_keep_the_marginal_of_wide_data():
    assert math.sqrt(moments("cps", 100, 0.7)[-1][2]) == pytest.approx(1.68, abs=5e-3)


@pytest.mark.parametrize("kind", ["cps", "ddim", "exact"])
@pytest.mark.parametrize("count", [3, 20])
def test_rebuilding_kinds_are_right_for_point_data_at_every_step(kind, count):
    for t, mean, variance in moments(kind, count, 0.7, s=0.0):
        assert mean == pytest.approx((1 - t) * M, abs=1e-12)
        assert variance == pytest.approx(t**2, abs=1e-12)


def test_flow_sde_leaves_excess_noise_where_they_do_not():
    t, _, variance = moments("flow_sde", 10, 0.7, s=0.0)[7]
    assert variance > 1.1 * t**2


def test_drawn_samples_have_the_marginal_of_the_steps():
    """Monte Carlo through :func:`sample`, four standard errors."""
    count, times = 40_000, grid(12)
    z = draw((count, 1))
    x, _ = sample(
        velocity_to(M, S),
        z,
        times,
        kind="flow_sde",
        noise_level=0.7,
        steps=range(12),
        noise=lambda i: draw((count, 1), i + 1),
    )
    _, mean, variance = moments("flow_sde", 12, 0.7)[-1]
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / count))
