"""Invariants that every loss keeps, one table of methods: the same samples, rewards and velocities go through all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from test_losses import draw, gradient
from torch import Tensor

from align.maths import losses, matching
from align.maths.advantages import group_advantage
from align.maths.pairs import top_k_pairs
from align.maths.weights import nft_probability, softmax_weight

PROMPTS, SIZE = 3, 4
COUNT = PROMPTS * SIZE
IMAGE, VIDEO = (COUNT, 3, 4, 4), (COUNT, 3, 2, 4, 2)
STD = 0.8


@dataclass
class Case:
    """``COUNT`` samples of ``PROMPTS`` prompts, noised once each; ``v`` has the gradient."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    v: Tensor
    v_old: Tensor
    rewards: Tensor
    group: Tensor

    @property
    def u(self) -> Tensor:
        return self.eps - self.x0

    @property
    def advantage(self) -> Tensor:
        return group_advantage(self.rewards, self.group, normalise_by="group").double()

    def errors(self) -> tuple[Tensor, Tensor]:
        """Of policy and old policy, ``[B, G]``."""
        return losses.mse(self.v, self.u).unflatten(0, (-1, SIZE)), losses.mse(self.v_old, self.u).unflatten(
            0, (-1, SIZE)
        )

    def logps(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the samples as Gaussian steps with means ``v`` and ``v_old``, per dimension."""
        return tuple(-losses.mse(v, self.u) / (2 * STD**2) for v in (self.v, self.v_old))  # type: ignore[return-value]

    @property
    def valid(self) -> Tensor:
        return torch.ones(len(self.v) // SIZE, SIZE, dtype=torch.bool)


def by_group(value: Tensor) -> Tensor:
    return value.unflatten(0, (-1, SIZE))


def of_steps(case: Case, name: str) -> Tensor:
    logp, old = case.logps()
    std = torch.full((len(case.v),), STD, dtype=torch.double)
    if name == "dppo":
        divergence = losses.kl_mean(case.v, case.v_old, std)
        return losses.masked_pg(logp, old, case.advantage, divergence, 10.0).value
    guard = losses.Guard(case.v, case.v_old, std, -std) if name == "guard" else None
    return losses.clipped_pg(logp, old, case.advantage, 10.0, guard=guard).value


def of_pairs(case: Case, name: str) -> Tensor:
    """Best with worst of each group."""
    chosen = top_k_pairs(case.rewards, case.group, 1, -1.0)
    w, loser = chosen.winner, chosen.loser
    if name == "pair_pref":
        now, old = (losses.mse(v, case.u) for v in (case.v, case.v_old))
        return losses.pair_pref(now[w], now[loser], old[w], old[loser], 3.0).value
    logp, old = case.logps()
    ratio = (logp - old.detach())[:, None]
    return losses.rdp(ratio[w], ratio[loser], chosen.gap, 0.5).value


def of_awm(case: Case) -> Tensor:
    now, old = (matching.fm_logp(losses.mse(v, case.u), case.t) for v in (case.v, case.v_old))
    return losses.clipped_pg(now, old, case.advantage, 1.0).value


def of_crd(case: Case) -> Tensor:
    implicit = matching.implicit_reward(case.v, case.v_old, case.u)
    return matching.crd(by_group(implicit), by_group(nft_probability(case.advantage)), case.valid, 1.0).value


def of_nft(case: Case) -> Tensor:
    x_t = losses.x_at(case.x0, case.eps, case.t)
    return losses.nft(case.x0, x_t, case.t, case.v, case.v_old, nft_probability(case.advantage), 1.0).value


def of_dgpo(case: Case) -> Tensor:
    return matching.dgpo(*case.errors(), by_group(case.advantage), case.valid, 10.0).value


def of_rwr(case: Case) -> Tensor:
    weight = softmax_weight(case.rewards, case.group, 0.5).double()
    return losses.weighted_fm(case.v, case.x0, case.eps, weight, case.v_old).value


METHODS: dict[str, Callable[[Case], Tensor]] = {
    "clipped_pg": lambda case: of_steps(case, "plain"),
    "guard": lambda case: of_steps(case, "guard"),
    "dppo": lambda case: of_steps(case, "dppo"),
    "rdp": lambda case: of_pairs(case, "rdp"),
    "pair_pref": lambda case: of_pairs(case, "pair_pref"),
    "nft": of_nft,
    "flow_rwr": of_rwr,
    "awm": of_awm,
    "dgpo": of_dgpo,
    "crd": of_crd,
}
PAIRED = ("pair_pref",)
"""They learn from ties too: a pair of equal rewards is not formed in a recipe."""
both = pytest.mark.parametrize("shape", [IMAGE, VIDEO], ids=["image", "video"])
every = pytest.mark.parametrize("method", METHODS)


def case(shape: tuple[int, ...], away: float = 0.0, equal: bool = False, shift: float = 0.0) -> Case:
    x0, eps, v_old, other = (draw(shape, seed) for seed in range(4))
    v = (v_old + away * other).requires_grad_()
    group = torch.arange(COUNT) // SIZE
    rewards = torch.full((COUNT,), 0.5) if equal else torch.arange(COUNT) * 5 % 7 / 8.0
    t = torch.linspace(0.2, 0.9, COUNT, dtype=torch.double)
    return Case(x0, eps, t, v, v_old, rewards + shift * (1 + group) / 2, group)


@every
@both
def test_equal_rewards_teach_nothing_at_the_old_policy(method, shape):
    """The fixed point: no gradient at v = v_old."""
    one = case(shape, equal=True)
    slope = gradient(METHODS[method](one), one.v)
    if method in PAIRED:
        assert slope.any()
    else:
        assert float(slope.abs().max()) < 1e-12


@every
@both
def test_different_rewards_improve_the_best_sample_and_worsen_the_worst(method, shape):
    """A step down the gradient from v = v_old lowers the error of every prompt's best sample, raises the worst's."""
    one = case(shape)
    before = losses.mse(one.v, one.u)
    after = losses.mse(one.v - 0.05 * gradient(METHODS[method](one), one.v), one.u)
    change, rewards = by_group(after - before), by_group(one.rewards)
    rows = torch.arange(PROMPTS)
    assert (change[rows, rewards.argmax(1)] < 0).all()
    assert (change[rows, rewards.argmin(1)] > 0).all()


@every
@both
def test_a_reward_that_is_higher_for_all_samples_of_a_prompt_changes_nothing(method, shape):
    one, other = case(shape, away=0.3), case(shape, away=0.3, shift=2.0)
    torch.testing.assert_close(METHODS[method](one), METHODS[method](other))


@every
@both
def test_a_batch_given_twice_has_the_same_mean(method, shape):
    """The second copy's prompts are prompts of their own."""
    one = case(shape, away=0.3)
    fields = {name: torch.cat([value, value]) for name, value in vars(one).items() if name != "group"}
    twice = Case(**fields, group=torch.cat([one.group, one.group + PROMPTS]))
    once, both_ = METHODS[method](one), METHODS[method](twice)
    torch.testing.assert_close(both_, torch.cat([once, once]))


@every
@both
def test_the_order_of_prompts_and_of_their_samples_is_not_seen(method, shape):
    one = case(shape, away=0.3)
    rows = torch.tensor([9, 8, 11, 10, 1, 0, 3, 2, 6, 7, 4, 5])
    mixed = Case(**{name: value[rows] for name, value in vars(one).items()})
    plain, other = METHODS[method](one), METHODS[method](mixed)
    torch.testing.assert_close(plain.sort().values, other.sort().values)


@every
def test_the_old_policy_gets_no_gradient(method):
    one = case(IMAGE, away=0.3)
    one.v_old.requires_grad_()
    METHODS[method](one).sum().backward()
    assert one.v.grad is not None
    assert one.v.grad.any()
    assert one.v_old.grad is None
