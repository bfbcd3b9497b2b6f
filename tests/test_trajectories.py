"""Whole trajectories: what is kept, what is stochastic, and the windows that decide it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.maths.samplers import STOCHASTIC, sample, step, window_steps

IMAGE, VIDEO = (4, 3, 4, 4), (4, 3, 5, 2, 2)
M = 0.5
SOME = settings(max_examples=40, deadline=None)


def velocity_to(m: float, s: float):
    """The exact velocity field of data N(m, s^2)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) * (x - (1 - t) * m) / variance

    return velocity


def grid(count: int) -> Tensor:
    return torch.linspace(1, 0, count + 1)


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- trajectories -------------------------------------------------------------------------------------------------


def noise_of(shape: tuple[int, ...]):
    return lambda index: draw(shape, 100 + index)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("kind", STOCHASTIC)
def test_a_kept_trajectory_scores_to_the_log_probabilities_it_was_drawn_with(kind, shape):
    velocity, times = velocity_to(M, 2.0), grid(6)
    x, path = sample(velocity, draw(shape), times, kind=kind, noise_level=0.7, noise=noise_of(shape), keep=True)
    assert path is not None
    assert path.steps == (0, 1, 2, 3, 4)
    assert path.x.shape == path.x_next.shape == path.mean.shape == (4, 5, *shape[1:])
    assert path.logp.shape == path.std.shape == (4, 5)
    assert torch.equal(path.x_next[:, :-1], path.x[:, 1:])
    n, s = torch.arange(4).repeat_interleave(5), torch.arange(5).repeat(4)
    v = torch.stack([velocity(path.x[i, k], path.t[k]) for i, k in zip(n, s, strict=True)])
    again = step(
        kind,
        path.x[n, s],
        v,
        path.t[s],
        path.t_next[s],
        noise_level=0.7,
        t_second=path.t_second,
        x_next=path.x_next[n, s],
    )
    torch.testing.assert_close(again.logp, path.logp[n, s], rtol=0, atol=1e-5)
    torch.testing.assert_close(again.mean, path.mean[n, s])
    assert torch.equal(again.std, path.std[n, s])
    last = path.x_next[:, -1]
    assert torch.equal(x, step("ode", last, velocity(last, times[5]), times[5], times[6]).x)


def test_only_the_window_is_stochastic():
    asked: list[int] = []

    def noise(index: int) -> Tensor:
        asked.append(index)
        return draw(IMAGE, index)

    velocity, times, start = velocity_to(M, 2.0), grid(8), draw(IMAGE, 50)
    _, path = sample(velocity, start, times, kind="cps", noise_level=0.8, steps=(3, 2), noise=noise, keep=True)
    assert path is not None
    assert asked == [2, 3]
    assert path.steps == (2, 3)
    assert torch.equal(path.t, times[2:4])
    assert torch.equal(path.t_next, times[3:5])
    prefix, _ = sample(velocity, start, times[:3])
    assert torch.equal(path.x[:, 0], prefix)


def test_no_stochastic_step_is_the_ode_and_the_same_noise_the_same_sample():
    velocity, times, start = velocity_to(M, 2.0), grid(5), draw(IMAGE, 50)
    ode, nothing = sample(velocity, start, times)
    assert nothing is None
    assert torch.equal(sample(velocity, start, times, kind="cps", noise_level=0.8, steps=())[0], ode)
    drawn = [sample(velocity, start, times, kind="cps", noise_level=0.8, noise=noise_of(IMAGE))[0] for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.allclose(drawn[0], ode, atol=0.1)


def test_x0_is_told_before_every_step():
    told: dict[int, Tensor] = {}
    velocity, start = velocity_to(M, 0.0), draw(IMAGE).bfloat16()
    noise = draw(IMAGE, 1).double()
    x, _ = sample(velocity, start, grid(4), kind="cps", noise_level=0.5, noise=lambda _: noise, on_x0=told.__setitem__)
    assert list(told) == [0, 1, 2, 3]
    for x0 in told.values():
        torch.testing.assert_close(x0, torch.full(IMAGE, M))
    assert x.dtype == torch.float32


def test_gradient_reaches_the_velocity_through_all_steps():
    bias = torch.zeros((), requires_grad=True)
    x, _ = sample(lambda x, t: 0 * x + bias, draw(IMAGE), grid(4))
    x.mean().backward()
    assert float(bias.grad) == pytest.approx(-1.0)  # x = eps - bias


def test_sampling_mistakes_are_named():
    velocity, x, times = velocity_to(M, 2.0), draw(IMAGE), grid(4)
    cases = [
        ({"kind": "euler"}, "unknown kind"),
        ({"kind": "cps", "noise_level": 0.5}, "needs noise"),
        ({"kind": "ode", "steps": (1,)}, "no stochastic steps"),
        ({"kind": "cps", "steps": (4,), "noise": noise_of(IMAGE)}, r"in \[0, 4\)"),
        ({"kind": "ode", "keep": True}, "keep"),
        ({"times": times.flip(0)}, "times should fall"),
        ({"times": times[:1]}, "times should fall"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            sample(velocity, x, **{"times": times, **options})


# -- windows ------------------------------------------------------------------------------------------------------


def test_all_steps_but_the_last():
    assert window_steps(10, None, None, "all", 3, 25, 0) == tuple(range(9))


def test_a_random_window_covers_its_range_evenly_and_repeats():
    drawn = [window_steps(10, 2, (0, 4), "random", i, 25, 7) for i in range(400)]
    assert all(b == a + 1 for a, b in drawn)
    counts = [sum(first == place for first, _ in drawn) for place in range(5)]
    assert sum(counts) == 400
    assert min(counts) > 50
    assert drawn == [window_steps(10, 2, (0, 4), "random", i, 25, 7) for i in range(400)]
    assert drawn != [window_steps(10, 2, (0, 4), "random", i, 25, 8) for i in range(400)]


def test_a_progressive_window_moves_on_and_wraps():
    starts = [window_steps(6, 3, None, "progressive", i, 25, 0)[0] for i in range(0, 150, 5)]
    assert starts == [0] * 5 + [1] * 5 + [2] * 5 + [0] * 5 + [1] * 5 + [2] * 5
    assert window_steps(25, 4, (2, 9), "progressive", 8 * 25, 25, 0) == (2, 3, 4, 5)


@SOME
@given(st.integers(2, 30), st.integers(1, 30), st.sampled_from(["random", "progressive"]), st.integers(0, 10**6))
def test_windows_stay_before_the_last_step(steps, size, strategy, iteration):
    size = min(size, steps - 1)
    window = window_steps(steps, size, None, strategy, iteration, 3, 1)
    assert window == tuple(range(window[0], window[0] + size))
    assert window[-1] < steps - 1


@pytest.mark.parametrize(
    ("size", "start", "strategy", "message"),
    [
        (None, None, "random", "needs a size"),
        (11, None, "random", "needs a size"),
        (3, (0, 8), "progressive", "starts in"),
        (3, (5, 4), "random", "starts in"),
        (3, None, "sliding", "all, random, progressive"),
    ],
)
def test_windows_that_do_not_fit(size, start, strategy, message):
    with pytest.raises(ValueError, match=message):
        window_steps(10, size, start, strategy, 0, 25, 0)
