"""The differentiable sampler beside automatic differentiation of a plain loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from align.rollout.unroll import unroll

TIMES = torch.tensor([1.0, 0.7, 0.5, 0.1, 0.0], dtype=torch.float64)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def field():
    """A velocity with parameters, the starting latents, and a count of its calls."""
    weight = numbers(0, 3, 3).requires_grad_()
    calls = []

    def velocity(x, t):
        calls.append(float(t))
        return torch.tanh(x @ weight) * (1 + t)

    return velocity, weight, numbers(1, 5, 3).requires_grad_(), calls


def plain(velocity, x, times, detach_before: int = 0):
    """Euler's loop; the latents are detached before step ``detach_before``."""
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = x.detach() if i == detach_before and detach_before else x
        x = x + (t_next - t) * velocity(x, t)
    return x


def gradients(latents, *to):
    return torch.autograd.grad(latents.square().sum(), to, allow_unused=True)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_its_gradient_is_that_of_a_plain_loop(field, checkpoint):
    velocity, weight, x, calls = field
    made = unroll(velocity, x, TIMES, checkpoint=checkpoint)
    got = gradients(made, weight, x)
    assert len(calls) == (8 if checkpoint else 4)
    wanted = plain(velocity, x, TIMES)
    torch.testing.assert_close(made, wanted)
    for a, b in zip(got, gradients(wanted, weight, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_last_steps_alone_are_those_after_detaching(field, last, checkpoint):
    velocity, weight, x, calls = field
    made = unroll(velocity, x, TIMES, last=last, checkpoint=checkpoint)
    got = gradients(made, weight, x)
    assert len(calls) == 4 + (last if checkpoint else 0)
    wanted = plain(velocity, x, TIMES, detach_before=4 - last)
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(got[0], gradients(wanted, weight)[0])
    assert got[1] is None
    assert not torch.allclose(got[0], gradients(plain(velocity, x, TIMES), weight)[0])


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("bridge", [[0, 2], [1], [0, 1, 2, 3]])
def test_a_bridge_adds_the_gradients_of_its_steps_and_passes_none_through_the_network(field, bridge, checkpoint):
    """The ODE is ``x0 = x + sum_i dt_i v_i``, so with detached inputs the gradient is a sum over the steps."""
    velocity, weight, x, calls = field
    made = unroll(velocity, x, TIMES, bridge=bridge, checkpoint=checkpoint)
    assert len(calls) == 4
    torch.testing.assert_close(made, plain(velocity, x, TIMES))
    at, sums = x.detach(), 0.0
    for i, (t, t_next) in enumerate(pairwise(TIMES)):
        v = velocity(at, t)
        sums = sums + ((t_next - t) * v if i in bridge else 0)
        at = (at + (t_next - t) * v).detach()
    (wanted,) = torch.autograd.grad((2 * made.detach() * sums).sum(), weight)
    got = gradients(made, weight, x)
    torch.testing.assert_close(got[0], wanted)
    torch.testing.assert_close(got[1], 2 * made.detach())  # of x through the steps alone
    assert not torch.allclose(wanted, gradients(plain(velocity, x, TIMES), weight)[0])


def test_more_steps_than_there_are_is_all_and_none_carries_no_graph(field):
    velocity, weight, x, _ = field
    everything = gradients(unroll(velocity, x, TIMES, last=9), weight, x)
    for a, b in zip(everything, gradients(unroll(velocity, x, TIMES), weight, x), strict=True):
        assert torch.equal(a, b)
    assert not unroll(velocity, x, TIMES, last=0).requires_grad


def test_it_starts_from_latents_part_of_the_way_with_any_step(field):
    velocity, weight, x, _ = field
    noise = numbers(2, 4, 5, 3)

    def step(i, x, v):
        return 0.5 * x - v + noise[i]

    half = unroll(velocity, x, TIMES[:3], step=step)
    rest = unroll(velocity, half, TIMES[2:], step=lambda i, x, v: step(i + 2, x, v))
    whole = x
    for i, t in enumerate(TIMES[:-1]):
        whole = step(i, whole, velocity(whole, t))
    torch.testing.assert_close(rest, whole)
    torch.testing.assert_close(gradients(rest, weight)[0], gradients(whole, weight)[0])


def test_gradients_are_on_in_the_last_steps_wherever_it_is_called(field):
    velocity, _, x, _ = field
    with torch.no_grad():
        assert unroll(velocity, x, TIMES, last=1).requires_grad


def test_half_precision_is_integrated_in_single(field):
    made = unroll(lambda x, t: x, torch.ones(2, 3, dtype=torch.bfloat16), TIMES.float())
    assert made.dtype == torch.float32


@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.0, 1.0, 0.0]])
def test_times_that_do_not_fall_are_refused(field, times):
    with pytest.raises(ValueError, match="times should fall"):
        unroll(field[0], field[2], torch.tensor(times))
    with pytest.raises(ValueError, match="at least 0; given -1"):
        unroll(field[0], field[2], TIMES, last=-1)
