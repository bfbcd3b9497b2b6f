"""Credit of steps and of sets: VGPO's values and anchored advantages, VPO's sets and marginals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_run import settings
from torch import Tensor

from align.maths import credit
from align.maths.advantages import group_advantage
from align.recipes.vgpo import VGPO
from align.recipes.vpo import VPO
from align.training.trainer import train
from alignflow.errors import TrainingError
from rewards.base import Scores

NAN = math.nan
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


# -- values of steps --------------------------------------------------------------------------------------------------


def test_values_and_shares_are_the_notes() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    values = credit.temporal_value(rewards, 0.5)
    assert values.tolist() == [[3.25, 4.5, 5.0, 4.0]]
    shares = credit.step_shares(values)
    torch.testing.assert_close(shares[0].float(), torch.tensor([0.7761, 1.0746, 1.1940, 0.9552]), atol=5e-5, rtol=0)
    assert float(shares.mean()) == pytest.approx(1)
    assert credit.temporal_value(rewards, 0.0).tolist() == rewards.tolist()
    torch.testing.assert_close(credit.step_shares(credit.temporal_value(7 * rewards, 0.5)), shares)


def test_shares_are_bounded_and_1_without_value() -> None:
    assert credit.step_shares(torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double()).tolist() == [[1, 1], [0.1, 2]]
    assert credit.step_shares(torch.tensor([[NAN, 2.0, 2.0]])).tolist()[0][1:] == [1, 1]


def test_a_group_without_differences_keeps_its_anchor() -> None:
    values = torch.tensor([[2.0, 1.0]]).repeat(4, 1)
    found = credit.anchored(values, torch.zeros(4, dtype=torch.long), 0.1, 1)
    share = 2.0 / 1.5
    torch.testing.assert_close(found, torch.tensor([[0.1 * 2.0 * share, 0.0]]).repeat(4, 1))


def test_one_step_without_an_anchor_is_grpo() -> None:
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.6, 0.3, NAN, 0.2, 0.8])
    for normalise_by in ("group", "global", "none"):
        found = credit.anchored(rewards[:, None], GROUP, 0.0, 5, normalise_by, clip=1.0)  # type: ignore[arg-type]
        torch.testing.assert_close(
            found[:, 0],
            group_advantage(rewards, GROUP, normalise_by=normalise_by, clip=1.0),  # type: ignore[arg-type]
        )


def of_steps(values: list[float], steps: list[list[float]], recipe: VGPO) -> Tensor:
    return recipe.credit(Scores(torch.tensor(values), steps=torch.tensor(steps)), torch.zeros(len(values), dtype=int))


def test_a_step_is_credited_with_what_it_led_to() -> None:
    """The prediction before the first step says nothing of it; the sample itself is what the last one led to."""
    recipe = VGPO(discount=0.0, anchor=0.0, advantage_clip=50)
    found = of_steps([1.0, 3.0], [[9.0, 1.0], [0.0, 1.0]], recipe)
    assert of_steps([1.0, 3.0], [[0.0, 1.0], [5.0, 1.0]], recipe).tolist() == found.tolist()
    assert found[:, 0].tolist() == [0, 0]  # both led to 1
    assert found[0, 1] < 0 < found[1, 1]
    assert of_steps([1.0, 1.0], [[0.0, 1.0], [0.0, 3.0]], recipe)[1, 0] > 0


def test_negative_rewards_are_moved_and_missing_ones_teach_nothing() -> None:
    recipe = VGPO()
    below = of_steps([-3.0, -1.0], [[0.0, -2.0], [0.0, -1.0]], recipe)
    torch.testing.assert_close(below, of_steps([0.0, 2.0], [[0.0, 1.0], [0.0, 2.0]], recipe))
    some = of_steps([1.0, 3.0, NAN], [[0.0, 1.0], [0.0, NAN], [0.0, 2.0]], recipe)
    assert some[2].tolist() == [0, 0]
    assert some[1, 0] == 0
    assert some[1, 1] > some[0, 1]
    assert of_steps([NAN, NAN], [[NAN, NAN], [NAN, NAN]], recipe).tolist() == [[0, 0], [0, 0]]


def test_the_terms_of_a_step_have_its_credit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Tensor]] = []
    terms_of = VGPO.terms

    def terms(self: VGPO, rollout: Any, credit: Tensor) -> Any:
        seen.append((terms_of(self, rollout, credit), credit))
        return seen[-1][0]

    monkeypatch.setattr(VGPO, "terms", terms)
    train(settings(tmp_path, model, "vgpo", train={"steps": 1}, prompts={"heldout": None}))
    ((found, values),) = seen
    assert values.shape == (8, 2)
    assert (values[:, 0] != values[:, 1]).all()
    assert torch.equal(found.credit, values[found.sample, found.slot])


def test_vgpo_refuses_rewards_that_compare(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="vgpo scores predictions step by step, but pairwise compares"):
        settings(tmp_path, model, "vgpo", reward={"kind": "pairwise"})
    with pytest.raises(ValidationError, match="vgpo needs a stochastic sampler"):
        settings(tmp_path, model, "vgpo", rollout={"sampler": {"kind": "ode", "steps": 3}})


# -- sets -------------------------------------------------------------------------------------------------------------


def test_set_scores_are_the_closed_forms() -> None:
    """Of the basis of d rewards the mean of the largest Dirichlet(1) weight, the harmonic number H_d over d."""
    two, three = credit.preference_weights(1, 200_000, 2), credit.preference_weights(2, 200_000, 3)
    assert float(credit.set_score(torch.eye(2), two)) == pytest.approx(0.75, abs=2e-3)
    assert float(credit.set_score(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), two)) == pytest.approx(0.5, abs=2e-3)
    assert float(credit.set_score(torch.eye(3), three)) == pytest.approx(11 / 18, abs=2e-3)
    assert float(credit.set_score(torch.tensor([[0.2], [0.7]]), torch.ones(4, 1))) == pytest.approx(0.7)
    assert torch.equal(credit.preference_weights(1, 3, 2), credit.preference_weights(1, 3, 2))
    torch.testing.assert_close(two.sum(1), torch.ones(200_000, dtype=torch.float64))


def test_marginals_are_what_the_set_loses() -> None:
    weights = credit.preference_weights(3, 64, 3)
    rewards = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[4] = rewards[0] - 0.1  # dominated
    whole = credit.set_score(rewards, weights)
    without = [credit.set_score(rewards[torch.arange(5) != j], weights) for j in range(5)]
    found = credit.marginal(rewards, weights)
    torch.testing.assert_close(found, whole - torch.stack(without))
    assert found[4] == 0
    assert (found >= 0).all()
    mixed = torch.tensor([2, 0, 4, 1, 3])
    torch.testing.assert_close(credit.marginal(rewards[mixed], weights), found[mixed])
    torch.testing.assert_close(credit.set_score(rewards[mixed], weights), whole)
    assert credit.marginal(rewards[[1, 1]], weights).tolist() == [0, 0]


def test_scales_are_from_0_to_1() -> None:
    found = credit.unit_scale(torch.tensor([[2.0, 5.0], [4.0, 5.0], [NAN, 5.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [1.0, 0.0], [NAN, 0.0]]), equal_nan=True)


def parts_of(rewards: Tensor) -> Scores:
    return Scores(rewards.sum(1), parts={"a": rewards[:, 0], "b": rewards[:, 1], "b/raw": rewards[:, 1]})


def test_the_best_under_some_weighting_gain_and_the_dominated_lose() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.3], [0.0, 0.0]]).repeat(2, 1)
    found = VPO(share="marginal").seeded_credit(parts_of(rewards), GROUP, 5)
    assert (found[[0, 1, 4, 5]] > 0).all()
    assert (found[[2, 3, 6, 7]] < 0).all()
    assert found[0] != found[4]  # each prompt has preferences of its own
    assert torch.equal(found, VPO(share="marginal").seeded_credit(parts_of(rewards), GROUP, 5))
    assert not torch.equal(found, VPO(share="marginal").seeded_credit(parts_of(rewards), GROUP, 6))
    half = VPO(share="marginal").seeded_credit(parts_of(rewards[4:]), GROUP[4:], 5)
    assert torch.equal(found[4:], half)  # whatever other prompts there are


def test_members_of_a_set_share_its_credit() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.3], [0.0, 0.0]]).repeat(2, 1)
    found = VPO(share="set", set_size=2).seeded_credit(parts_of(rewards), GROUP, 5)
    assert found[0] == found[1] > 0 > found[2] == found[3]
    rewards[0, 0] = NAN
    found = VPO(share="set", set_size=2).seeded_credit(parts_of(rewards), GROUP, 5)
    assert found[:4].tolist() == [0] * 4
    assert found[4] == found[5] > 0
    found = VPO(share="marginal").seeded_credit(parts_of(rewards), GROUP, 5)
    assert found[0] == 0
    assert found[1] > 0


def test_named_parts_are_used_and_unknown_ones_named() -> None:
    rewards = torch.rand(8, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        VPO(parts=["a", "b/raw"], share="marginal").seeded_credit(parts_of(rewards), GROUP, 5),
        VPO(share="marginal").seeded_credit(parts_of(rewards), GROUP, 5),
    )
    with pytest.raises(TrainingError, match=r"recipe.parts: the reward has no part 'c', only a, b, b/raw"):
        VPO(parts=["a", "c"], share="marginal").seeded_credit(parts_of(rewards), GROUP, 5)


ONE = {"reward": {"kind": "tiny_run:redness"}}


@pytest.mark.parametrize(
    ("recipe", "parts", "says"),
    [
        ({"share": "marginal"}, {"a": ONE}, "vpo needs several rewards, but there is one"),
        ({"parts": ["a", "c"]}, {"a": ONE, "b": ONE}, "no member 'c' in reward.parts; there are a, b"),
        ({}, {"a": ONE, "b": {**ONE, "gate": 0.1}}, "member 'b' is a gate or a penalty: name the others"),
        ({}, {"a": ONE, "b": {**ONE, "weight": -1}}, "member 'b' is a gate or a penalty: name the others"),
        ({"share": "set"}, {"a": ONE, "b": ONE}, "4 samples cannot be divided into two or more sets of 3"),
        (
            {"share": "set", "set_size": 4},
            {"a": ONE, "b": ONE},
            "4 samples cannot be divided into two or more sets of 4",
        ),
    ],
)
def test_vpo_says_what_it_lacks(recipe: Any, parts: Any, says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(tmp_path, model, {"kind": "vpo", **recipe}, reward={"kind": "mixture", "parts": parts})


def test_sets_train_with_the_rollouts_seed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    seeded = VPO.seeded_credit

    def noted(self: VPO, scores: Scores, group: Tensor, seed: int) -> Tensor:
        seeds.append(seed)
        return seeded(self, scores, group, seed)

    monkeypatch.setattr(VPO, "seeded_credit", noted)
    config = settings(tmp_path, model, {"kind": "vpo", "share": "set", "set_size": 2}, train={"steps": 2})
    train(config)
    assert len(set(seeds)) == 2
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows if row["event"] == "train")
