"""NP-Edit: the loss of a judge's yes, where samples leave the sampler, and both terms at the prediction there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_learners import bench_of, shake
from tiny_run import RECIPES, final_tensors, redness, settings

from align.maths import direct, losses
from align.recipes.base import Point
from align.rollout.bench import Bench
from align.rollout.rollout import Scored, draw
from align.rollout.sources import OnlineSource, Share
from align.training.trainer import train
from alignflow.errors import TrainingError
from rewards.base import Scores


def gap_slope(gap: float, temperature: float) -> tuple[float, float]:
    """Loss and its derivative by the gap of the logits."""
    logit = torch.tensor([gap], dtype=torch.double, requires_grad=True)
    loss = direct.yes_loss(logit.sigmoid(), temperature)
    (slope,) = torch.autograd.grad(loss.sum(), logit)
    return float(loss.detach()), float(slope)


def test_an_undecided_judge_costs_log_two() -> None:
    for temperature in (0.1, 1.0):
        value, slope = gap_slope(0.0, temperature)
        assert value == pytest.approx(math.log(2))
        assert slope == pytest.approx(-temperature / 2)


@pytest.mark.parametrize("gap", [-2.0, 0.7, 3.0])
def test_it_is_the_cross_entropy_of_the_scaled_logits(gap: float) -> None:
    for temperature in (0.1, 0.5, 1.0):
        logits = torch.tensor([gap, 0.0], dtype=torch.double) * temperature
        assert gap_slope(gap, temperature)[0] == pytest.approx(-float(logits.log_softmax(0)[0]))


def test_the_other_answer_turns_the_gradient() -> None:
    probability = torch.tensor([0.5], dtype=torch.double, requires_grad=True)
    yes, no = (torch.autograd.grad(direct.yes_loss(p).sum(), probability)[0] for p in (probability, 1 - probability))
    torch.testing.assert_close(yes, -no)
    assert (yes < 0).all()


def test_the_gradient_ends_with_the_temperature() -> None:
    slopes = [abs(gap_slope(1.0, temperature)[1]) for temperature in (1.0, 0.1, 0.01, 0.0)]
    assert slopes[1] < slopes[0]
    assert slopes[2] < 0.11 * slopes[1]
    assert slopes[3] == 0


def test_certain_answers_are_finite() -> None:
    probability = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = direct.yes_loss(probability)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), probability)[0].tolist() == [0.0, 0.0]


def unscored(config: Any) -> tuple[Bench, Scored]:
    """Generator, learners and reward, and a rollout whose samples the loss draws."""
    generator, plain = bench_of(config)
    shake(plain)
    assert config.reward is not None
    bench = Bench(generator, plain.learners, reward=config.reward.build("cpu"), only=plain.only)
    asked = OnlineSource(config, generator, Share(), config.recipe.needs)(0)
    rollout = asked.become(Scored, scores=Scores(torch.full((len(asked.seeds),), torch.nan)))
    with torch.no_grad():
        seen = config.recipe.look(torch.arange(len(asked.seeds)), rollout, bench)
    return bench, rollout.become(Scored, seen=seen)


def test_samples_leave_the_sampler_at_a_random_step(model: Path, tmp_path: Path) -> None:
    """What was seen there is the state of the sampler, and the last step's prediction is the sample."""
    config = settings(tmp_path, model, "np_edit", rollout={"sampler": {"kind": "cps", "steps": 3, "noise_level": 1.0}})
    bench, rollout = unscored(config)
    grid, seen = bench.generator.times(3), rollout.seen
    assert set(seen["t"].tolist()) == set(grid[:3].tolist())
    first = seen["t"] == 1
    assert torch.equal(seen["x"][first], rollout.latents[first])
    with torch.no_grad():
        v = bench.velocity("policy", Point(seen["x"], seen["t"], rollout.cond_of(torch.arange(8))))
    torch.testing.assert_close(seen["clean"], losses.x0_from(seen["x"], v, seen["t"]), atol=1e-5, rtol=1e-5)
    assert rollout.sampler is not None
    whole, _ = draw(bench.generator, rollout.cond, rollout.seeds, rollout.sampler, row=rollout.row)
    last = seen["t"] == grid[2]
    torch.testing.assert_close(seen["clean"][last], whole[last], atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_sum_of_the_judge_and_of_matching(model: Path, tmp_path: Path) -> None:
    options = {**RECIPES["np_edit"], "judge": 0.5, "matching": 2.0, "temperature": 0.3}
    config = settings(tmp_path, model, options)
    bench, rollout = unscored(config)
    recipe = config.recipe
    terms = recipe.terms(rollout, rollout.scores.values)
    with bench.acting("policy"):
        loss = recipe.loss(terms, rollout, bench)
        seen, cond = rollout.seen, rollout.cond_of(terms.sample)
        v = bench.velocity("policy", Point(seen["x"], seen["t"], cond))
        x = losses.x0_from(seen["x"], v, seen["t"])
        noisy = losses.x_at(x.detach(), rollout.noise(terms.sample, terms.slot), terms.t)
        real = bench.velocity("reference", Point(noisy, terms.t, cond, 3.0))
        fake = bench.velocity("critic", Point(noisy, terms.t, cond))
        dmd = losses.dmd(x, *(losses.x0_from(noisy, v, terms.t) for v in (real, fake))).value
    values = redness(bench.decode(x), rollout.prompts)
    judged = direct.yes_loss((values + 1) / 2, 0.3)
    torch.testing.assert_close(loss.value, 0.5 * judged + 2 * dmd, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.metrics["judge"], judged.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.scores.values, values.detach(), atol=1e-5, rtol=1e-5)


def test_a_student_of_one_step_learns(model: Path, tmp_path: Path) -> None:
    one = {"kind": "ode", "steps": 1}
    options = {**RECIPES["np_edit"], "above_next": True}
    config = settings(tmp_path, model, options, rollout={"sampler": one}, evaluate={"sampler": one})
    _, rollout = unscored(config)
    assert set(rollout.seen["t"].tolist()) == {1.0}
    assert torch.equal(rollout.seen["x"], rollout.latents)
    assert train(config)["status"] == "finished"
    assert any(value.any() for name, value in final_tensors(config).items() if "lora_B" in name)


def test_the_critic_models_what_the_student_predicts(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "np_edit")
    bench, rollout = unscored(config)
    critic = config.recipe.learners()["critic"].objective
    terms = critic.terms(rollout, torch.zeros(8))
    with bench.acting("critic"):
        loss = critic.loss(terms, rollout, bench)
        x0, eps = rollout.seen["clean"][terms.sample], rollout.noise(terms.sample, terms.slot)
        v = bench.velocity("critic", Point(losses.x_at(x0, eps, terms.t), terms.t, rollout.cond_of(terms.sample)))
    torch.testing.assert_close(loss.value, losses.mse(v, eps - x0))
    own = config.recipe.terms(rollout, torch.zeros(8))
    assert not set(own.slot.tolist()) & set(terms.slot.tolist())  # noise that the critic was not trained on


def test_the_temperature_follows_its_schedule(model: Path, tmp_path: Path) -> None:
    schedule = {"temperature": [[0, 0.1], [2000, 1.0]]}
    recipe = settings(tmp_path, model, {**RECIPES["np_edit"], "schedule": schedule}).recipe
    assert [recipe.at(step).temperature for step in (0, 1000, 2000, 9000)] == pytest.approx([0.1, 0.55, 1, 1])


def test_a_reward_that_is_no_probability_is_named(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, {**RECIPES["np_edit"], "span": [2, 3]})
    with pytest.raises(TrainingError, match=r"np_edit: reward -?0.\d+ is outside recipe.span \[2, 3\]"):
        train(config)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"recipe": {"span": [1, 0]}}, r"recipe.span\s.*should rise, given \[1.0, 0.0\]"),
        ({"evaluate": {"sampler": {"steps": 4}}}, "np_edit trains a student of 3 steps: evaluate it with as many"),
        ({"policy": {"kind": "full"}}, "np_edit trains a critic on the same network: use lora"),
        ({"reward": {"kind": "shapes"}}, "np_edit follows the reward's gradient, and shapes has none"),
    ],
)
def test_what_does_not_go_together_is_said(sections: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    given = dict(sections)
    with pytest.raises(ValueError, match=says):
        settings(tmp_path, model, {"kind": "np_edit", **given.pop("recipe", {})}, **given)
