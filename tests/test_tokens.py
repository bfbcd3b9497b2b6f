"""Losses of language models on log-probabilities of tokens, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from align.maths.advantages import group_advantage
from align.maths.tokens import text_dpo, token_kl, token_mean, token_nll, token_pg, token_sum

MASK = torch.tensor([[True, True, False], [True, False, False]])


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def test_what_lies_beyond_a_reply_counts_in_nothing():
    values = logs([-1.0, -3.0, -99.0], [-2.0, -99.0, math.nan])
    assert token_mean(values, MASK).tolist() == [-2.0, -2.0]
    assert token_sum(values, MASK).tolist() == [-4.0, -2.0]
    assert token_nll(values, MASK).value.tolist() == [2.0, 2.0]
    token_nll(values, MASK).value.sum().backward()
    assert values.grad.tolist() == [[-0.5, -0.5, 0.0], [-1.0, 0.0, 0.0]]


def test_a_reply_without_tokens_gives_nothing():
    assert token_mean(logs([-1.0]), torch.tensor([[False]])).tolist() == [0.0]


def test_kl_is_that_of_k3():
    policy, reference = logs([math.log(0.5), math.log(0.2), 0.0]), torch.tensor([[math.log(0.25), math.log(0.4), 5.0]])
    first = 0.5 - math.log(0.5) - 1
    second = 2.0 - math.log(2.0) - 1
    assert token_kl(policy, reference, MASK[:1]).item() == pytest.approx((first + second) / 2, abs=1e-7)
    assert token_kl(policy, policy, MASK[:1]).item() == 0.0


def test_kl_is_unbiased_over_the_policys_own_tokens():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    each = token_kl(p.log()[:, None], q.log()[:, None], torch.ones(3, 1, dtype=torch.bool))
    assert (p * each).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)


def test_grpo_at_the_behaviour_policy_is_minus_the_advantage():
    logp = logs([-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0])
    found = token_pg(logp, logp.detach(), torch.tensor([1.5, -0.5]), MASK, 0.2)
    assert found.value.tolist() == [-1.5, 0.5]
    assert found.metrics["ratio"].tolist() == [1.0, 1.0]
    found.value.sum().backward()
    assert logp.grad.tolist() == [[-0.75, -0.75, 0.0], [0.5, 0.0, 0.0]]


def test_grpo_clips_every_token_by_itself():
    old = torch.zeros(1, 3, dtype=torch.float64)
    logp = logs([math.log(1.5), math.log(1.1), 9.0])
    found = token_pg(logp, old, torch.tensor([2.0]), MASK[:1], 0.2)
    assert found.value.item() == pytest.approx(-2 * (1.2 + 1.1) / 2)
    assert found.metrics["clipped"].tolist() == [0.5]
    found.value.sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([0.0, -1.1, 0.0])
    lower = token_pg(logs([math.log(0.5), math.log(1.5), 9.0]), old, torch.tensor([-2.0]), MASK[:1], 0.2)
    assert lower.value.item() == pytest.approx(2 * (0.8 + 1.5) / 2)


def test_grpo_adds_kl_to_the_reference():
    logp, reference = logs([-1.0, -2.0, 0.0]), torch.tensor([[-1.5, -1.0, 0.0]])
    plain = token_pg(logp, logp.detach(), torch.tensor([1.0]), MASK[:1], 0.2)
    found = token_pg(logp, logp.detach(), torch.tensor([1.0]), MASK[:1], 0.2, 0.25, reference)
    kl = token_kl(logp, reference, MASK[:1])
    assert found.value.item() == pytest.approx(plain.value.item() + 0.25 * kl.item())
    assert found.metrics["kl"].item() == pytest.approx(kl.item())
    with pytest.raises(ValueError, match="needs logp_ref"):
        token_pg(logp, logp, torch.tensor([1.0]), MASK[:1], 0.2, 0.25)


def test_equal_rewards_teach_grpo_nothing():
    """The identity rewriter: all rewrites of a prompt are the prompt, so their scores and noise are the same."""
    assert group_advantage(torch.full((8,), 0.37), torch.zeros(8, dtype=torch.long)).tolist() == [0.0] * 8


def test_text_dpo():
    zero = torch.zeros(1, dtype=torch.float64)
    assert text_dpo(zero - 4, zero - 9, zero - 4, zero - 9, 0.1).value.item() == pytest.approx(math.log(2))
    found = text_dpo(zero - 3, zero - 9, zero - 4, zero - 5, 0.1)  # beta ((1) - (-4)) = 0.5
    assert found.value.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5))))
    assert (found.metrics["margin"].item(), found.metrics["accuracy"].item()) == (pytest.approx(0.5), 1.0)
    swapped = text_dpo(zero - 9, zero - 3, zero - 5, zero - 4, 0.1)
    assert found.value.item() + swapped.value.item() >= 2 * math.log(2)


def test_text_dpo_raises_the_winner_and_lowers_the_loser():
    winner, loser = logs([-4.0]).flatten(), logs([-5.0]).flatten()
    better, worse = winner.detach().requires_grad_(), loser.detach().requires_grad_()
    text_dpo(better, worse, winner.detach(), loser.detach(), 0.1).value.sum().backward()
    assert (better.grad.item(), worse.grad.item()) == (pytest.approx(-0.05), pytest.approx(0.05))
