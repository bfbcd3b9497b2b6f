"""Reward-weighted regression: its loss with and without the control variate."""

from __future__ import annotations

import torch
from torch import Tensor

from align.maths.losses import weighted_fm
from align.recipes.flow_rwr import FlowRWR
from rewards.base import Scores

DOUBLE = torch.float64


def two_points(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Data is -1 or 1, evenly: ``(x0, eps, p(x0 | x_t))``, each ``[n, 2]``, at the noised places ``x_t [n]``."""
    x0 = torch.tensor([[-1.0, 1.0]], dtype=DOUBLE).expand(len(x_t), 2)
    eps = (x_t[:, None] - (1 - t[:, None]) * x0) / t[:, None]
    return x0, eps, torch.softmax(-eps.square() / 2, 1)


def test_the_control_variate_leaves_the_expected_gradient() -> None:
    """Where ``v_old`` is the mean of u given x_t, both losses pull equally at every x_t, wherever v is."""
    x_t, t = torch.linspace(-2, 2, 9, dtype=DOUBLE), torch.linspace(0.2, 0.9, 9, dtype=DOUBLE)
    x0, eps, share = two_points(x_t, t)
    v_old = (share * (eps - x0)).sum(1, keepdim=True).expand_as(x0)
    weight = torch.tensor([0.3, 1.7], dtype=DOUBLE).repeat(9)
    gradients = []
    for old in (None, v_old.reshape(-1, 1)):
        v = torch.full((9,), 0.4, dtype=DOUBLE, requires_grad=True)
        value = weighted_fm(
            v[:, None].expand(9, 2).reshape(-1, 1), x0.reshape(-1, 1), eps.reshape(-1, 1), weight, old
        ).value
        (share.flatten() * value).sum().backward()
        gradients.append(v.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
    assert float(gradients[0].abs().min()) > 0.01


def test_equal_rewards_teach_nothing_with_the_control_variate() -> None:
    """Weights of 1 at ``v = v_old``: no gradient from any single sample, where plain regression has one."""
    torch.manual_seed(0)
    x0, eps, v_old = torch.randn(3, 5, 2, 4).unbind()
    for old, moved in ((None, True), (v_old, False)):
        v = v_old.clone().requires_grad_()
        weighted_fm(v, x0, eps, torch.ones(5), old).value.sum().backward()
        assert bool(v.grad.abs().max() > 0) is moved


def test_the_minimum_lies_where_the_weight_puts_it() -> None:
    """One sample of weight w: ``v = v_old + (1 - 1/w)(u - v_old)``, by setting the gradient to 0."""
    u, v_old, weight = torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([4.0])
    v = (v_old + (1 - 1 / weight) * (u - v_old)).requires_grad_()
    weighted_fm(v, torch.zeros_like(u), u, weight, v_old).value.sum().backward()
    assert abs(float(v.grad)) < 1e-6


def test_weights_of_a_group_have_mean_one() -> None:
    """What the control variate relies on."""
    rewards, group = torch.tensor([0.1, 0.9, 0.4, 0.5, 0.5, 0.5]), torch.tensor([0, 0, 0, 1, 1, 1])
    credit = FlowRWR(temperature=0.3).credit(Scores(rewards), group)
    assert torch.allclose(credit.reshape(2, 3).mean(1), torch.ones(2))
    assert torch.allclose(credit[3:], torch.ones(3))
