"""Reward gradients: of a linear field against closed forms, of the sampler that draws, without missing scores."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from test_training import optimizer_moments
from tiny_run import final_tensors, settings
from torch import Tensor, nn

from align.config.sampling import Sampler
from align.maths.samplers import spaced_steps
from align.maths.seeds import whole
from align.policy.build import build_generator
from align.policy.roles import Roles
from align.recipes.gradients.reward_backprop import RewardBackprop
from align.rollout.bench import Bench
from align.rollout.rollout import Scored, draw
from align.rollout.sources import OnlineSource, Share
from align.rollout.unroll import known_scores
from align.training.trainer import train
from generators.base import Conditioning
from rewards.base import Reward, RewardError, Scores

THETA, AIM, STEPS = 0.3, 0.2, 5
H = 1 / STEPS


@dataclass
class Linear:
    """A generator with ``v = theta x``, whose ODE step multiplies by ``1 - theta h``, and latents that are media."""

    theta: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.tensor(THETA, dtype=torch.double)))
    calls: int = 0

    def times(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.double)

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning, guidance: float = 1.0) -> Tensor:
        self.calls += len(x)
        return self.theta * guidance * x

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-9, rtol=1e-5)


def quadratic(media: Tensor, prompts: list[str], group: Tensor) -> Tensor:
    """``-(mean x - AIM)^2``."""
    return -((media.flatten(1).mean(1) - AIM) ** 2)


def toy(recipe: RewardBackprop, noise: Tensor, guidance: float = 1.0, function: Any = quadratic) -> tuple:
    """Loss of a recipe on the linear generator, and its gradient to theta."""
    generator, count = Linear(), len(noise)
    reward = Reward("quadratic", function, differentiable=True)
    bench = Bench(generator, {"policy": Roles([("theta", generator.theta)], ["reference"])}, reward=reward)  # type: ignore[arg-type]
    rollout = Scored(
        prompts=["a"] * count, group=torch.zeros(count, dtype=torch.long), seeds=list(range(count)), seed=3,
        cond=Conditioning({"c": torch.zeros(1, 1)}), row=torch.zeros(count, dtype=torch.long), steps=(),
        sampler=Sampler(steps=STEPS, guidance=guidance), latents=noise, media=torch.empty(0),
        scores=Scores(torch.full((count,), torch.nan)),
    )  # fmt: skip
    terms = recipe.terms(rollout, rollout.scores.values)
    with bench.acting("policy"):
        loss = recipe.loss(terms, rollout, bench)
        (slope,) = torch.autograd.grad(loss.value.sum(), generator.theta)
    return loss, float(slope), rollout, bench


NOISE = torch.tensor([1.5, -0.7], dtype=torch.double).view(2, 1, 1, 1).expand(2, 3, 2, 2)
ONE = NOISE[:, 0, 0, 0]


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("last", [1, 2, STEPS])
def test_draft_is_the_derivative_of_the_last_steps_alone(last: int, guidance: float) -> None:
    loss, slope, *_ = toy(RewardBackprop(last=last), NOISE, guidance)
    factor = 1 - THETA * guidance * H
    x0 = ONE * factor**STEPS
    close(loss.value.detach(), (x0 - AIM) ** 2)
    by_theta = -last * guidance * H * x0 / factor  # of factor ** last, what comes before is constant
    assert slope == pytest.approx(float((2 * (x0 - AIM) * by_theta).sum()), rel=1e-5)


def test_draft_lv_averages_over_the_sample_and_its_noised_copies() -> None:
    loss, slope, rollout, _ = toy(RewardBackprop(noises=2), NOISE)
    x0 = ONE * (1 - THETA * H) ** STEPS
    sample = torch.arange(2)
    eps = [rollout.noise(sample, torch.full((2,), k)).double() for k in range(2)]
    ends = [((1 - H) * x0.view(2, 1, 1, 1) + H * one).flatten(1).mean(1) for one in eps]
    rendered = [x0, *(end * (1 - THETA * H) for end in ends)]
    close(loss.value.detach(), sum((x - AIM) ** 2 for x in rendered) / 3)
    by_theta = [-H * x0 / (1 - THETA * H), *(-H * end for end in ends)]
    wanted = sum(float((2 * (x - AIM) * d).sum()) for x, d in zip(rendered, by_theta, strict=True)) / 3
    assert slope == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(loss.media[:, 0, 0, 0].double(), x0)  # the log is of the samples themselves


def test_refl_stops_at_random_and_predicts_the_clean_sample() -> None:
    recipe = RewardBackprop(remaining=(2, 4), margin=0.5, scale=1e-3)
    left = whole(2, 4, 3, "remaining")
    loss, slope, _, bench = toy(recipe, NOISE)
    stopped, t = ONE * (1 - THETA * H) ** (STEPS - left), left * H
    x0 = stopped * (1 - t * THETA)
    close(loss.value.detach(), 1e-3 * (0.5 + (x0 - AIM) ** 2))
    assert slope == pytest.approx(1e-3 * float((2 * (x0 - AIM) * -t * stopped).sum()), rel=1e-5)
    assert bench.generator.calls == 2 * (STEPS - left + 1)  # type: ignore[attr-defined]


def test_refl_has_no_gradient_above_its_margin() -> None:
    for margin, wanted in ((-10.0, 0.0), (10.0, None)):
        loss, slope, *_ = toy(RewardBackprop(margin=margin), NOISE)
        assert (slope == 0) == (wanted == 0)
        assert (loss.value == 0).all() == (wanted == 0)


def test_alignprop_draws_the_number_of_steps_for_each_rollout() -> None:
    slopes = [toy(RewardBackprop(last=last), NOISE)[1] for last in range(1, STEPS + 1)]
    drawn = whole(1, STEPS, 3, "last")
    assert toy(RewardBackprop(last=(1, STEPS)), NOISE)[1] == slopes[drawn - 1]
    assert {whole(1, STEPS, seed, "last") for seed in range(60)} == set(range(1, STEPS + 1))


@pytest.mark.parametrize("count", [1, 2, STEPS])
def test_drtune_adds_up_its_steps_as_if_their_inputs_were_given(count: int) -> None:
    """``x0 = x - h sum_i theta x_i`` with the x_i constant, so the derivative is the sum over the steps."""
    chosen = spaced_steps(count, STEPS, 3)
    loss, slope, *_ = toy(RewardBackprop(bridge=count), NOISE)
    x0 = ONE * (1 - THETA * H) ** STEPS
    close(loss.value.detach(), (x0 - AIM) ** 2)
    by_theta = sum(-H * ONE * (1 - THETA * H) ** i for i in chosen)
    assert slope == pytest.approx(float((2 * (x0 - AIM) * by_theta).sum()), rel=1e-5)


def test_drtune_stops_early_as_refl_does() -> None:
    left = whole(2, 4, 3, "remaining")
    loss, slope, _, bench = toy(RewardBackprop(bridge=2, remaining=(2, 4)), NOISE)
    taken = STEPS - left + 1
    before = [ONE * (1 - THETA * H) ** i for i in range(taken)]
    t = left * H
    x0 = before[-1] * (1 - t * THETA)
    close(loss.value.detach(), (x0 - AIM) ** 2)
    lengths = [H] * (taken - 1) + [t]
    by_theta = sum(-lengths[i] * before[i] for i in spaced_steps(2, taken, 3))
    assert slope == pytest.approx(float((2 * (x0 - AIM) * by_theta).sum()), rel=1e-5)
    assert bench.generator.calls == 2 * taken + 2 * sum(1 for i in spaced_steps(2, taken, 3))  # type: ignore[attr-defined]


def test_spaced_steps_cover_all_steps() -> None:
    for count in (1, 2, 3, 5, 10):
        found = [spaced_steps(count, 10, seed) for seed in range(80)]
        assert {step for one in found for step in one} == set(range(10))
        assert all(len({b - a for a, b in pairwise(one)}) <= 1 and len(one) == count for one in found)


def test_the_pull_to_the_base_is_the_velocity_at_the_last_step() -> None:
    """After a step the reference is the theta of before."""
    recipe, plain = RewardBackprop(kl=2.0), RewardBackprop()
    loss, slope, *_ = toy(recipe, NOISE)
    assert slope == toy(plain, NOISE)[1]  # at the base there is none
    assert (loss.metrics["kl_velocity"] == 0).all()
    generator = Linear()
    roles = Roles([("theta", generator.theta)], ["reference"])
    generator.theta.data += 0.1
    roles.policy_changed()
    bench = Bench(generator, {"policy": roles}, reward=Reward("quadratic", quadratic, differentiable=True))  # type: ignore[arg-type]
    rollout = toy(plain, NOISE)[2]
    with bench.acting("policy"):
        found = [one.loss(one.terms(rollout, ONE), rollout, bench) for one in (recipe, plain)]
        slopes = [float(torch.autograd.grad(one.value.sum(), generator.theta)[0]) for one in found]
    x = ONE * (1 - (THETA + 0.1) * H) ** (STEPS - 1)
    gap = (found[0].value - found[1].value).detach().double()
    torch.testing.assert_close(gap, 2 * (0.1 * x) ** 2, atol=1e-7, rtol=1e-4)
    assert slopes[0] - slopes[1] == pytest.approx(float((2 * 2 * 0.1 * x**2).sum()), rel=1e-4)


def test_a_missing_score_sends_no_gradient_not_even_nan() -> None:
    def roots(media: Tensor, prompts: list[str], group: Tensor) -> Tensor:
        return media.flatten(1).mean(1).sqrt()  # NaN, with a gradient of NaN, for the second

    loss, slope, *_ = toy(RewardBackprop(), NOISE, function=roots)
    assert loss.scores.values.isnan().tolist() == [False, True]
    assert loss.scores.reasons == {1: "the reward returned nan"}
    assert loss.value[1] == 0
    assert slope == pytest.approx(toy(RewardBackprop(), NOISE[:1], function=roots)[1], rel=1e-6)


def test_copies_without_a_score_are_left_out_of_the_mean() -> None:
    def first(media: Tensor, prompts: list[str], group: Tensor) -> Tensor:
        return torch.cat([quadratic(media[:2], prompts[:2], group[:2]), torch.full((len(media) - 2,), torch.nan)])

    loss, slope, *_ = toy(RewardBackprop(noises=2), NOISE, function=first)
    alone, wanted, *_ = toy(RewardBackprop(), NOISE)
    torch.testing.assert_close(loss.value, alone.value)
    assert slope == pytest.approx(wanted)


def test_known_scores_cut_the_gradient_where_a_formula_gives_nan() -> None:
    media = torch.tensor([[4.0], [-1.0]], requires_grad=True)
    values = known_scores(media.flatten().sqrt(), media * 1.0)
    assert values.tolist() == [2.0, 0.0]
    pixels = media * 1.0
    known_scores(pixels.flatten().sqrt(), pixels).sum().backward()
    assert media.grad is not None
    assert media.grad.flatten().tolist() == [0.25, 0.0]


# -- the sampler that draws -------------------------------------------------------------------------------------------

SAMPLERS = [
    {"kind": "ode", "guidance": 2.0}, {"kind": "dpm2"}, {"kind": "flow_sde"}, {"kind": "cps"}, {"kind": "ddim"},
    {"kind": "dance_sde", "window": {"strategy": "random", "size": 2}},
]  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler["kind"])
def test_the_loss_draws_the_samples_of_a_rollout(sampler: dict[str, Any], model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "reward_backprop", rollout={"sampler": {"steps": 4, **sampler}})
    generator = build_generator(config.generator, config.memory, "cpu")
    asked = OnlineSource(config, generator, Share(), config.recipe.needs)(2)
    assert asked.sampler is not None
    drawn, _ = draw(generator, asked.cond, asked.seeds, asked.sampler, row=asked.row, steps=asked.steps)
    sample = torch.tensor([5, 2])
    times, step = asked.course(sample, generator)
    bench = Bench(generator, {"policy": Roles([])})
    cond = asked.cond_of(sample)
    made = bench.unroll(asked.latents[sample], times, cond, guidance=asked.guidance, step=step, last=2)
    torch.testing.assert_close(made, drawn[sample], atol=1e-5, rtol=0)
    assert not torch.allclose(made, drawn[[2, 5]], atol=1e-2)


# -- in a run ---------------------------------------------------------------------------------------------------------


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["event"] == "train"]


GROUPED = {"kind": "tiny_run:apart", "scope": "group"}
GAPS = {"kind": "tiny_run:missing_by_content"}


def trained(folder: Path, model: Path, **sections: Any) -> Path:
    folder.mkdir()
    config = settings(folder, model, "reward_backprop", **{"prompts": {"heldout": None}, **sections})
    train(config)
    return config.run_dir


def gap(one: Path, two: Path) -> float:
    """Largest relative difference of the first moments of AdamW."""
    pairs = zip(optimizer_moments(one), optimizer_moments(two), strict=True)
    return max(float((a - b).norm() / (a.norm() + 1e-12)) for a, b in pairs)


def test_missing_scores_are_counted_and_change_no_gradient_by_chunks(model: Path, tmp_path: Path) -> None:
    options = {"steps": 1, "max_grad_norm": 1e6}
    runs = [trained(tmp_path / str(size), model, reward=GAPS, train={**options, "chunk": size}) for size in (1000, 3)]
    for run in runs:
        (row,) = rows(run)
        assert 0 < row["missing"] < 8
        assert row["reasons"] == [f"{row['missing']} x the reward returned nan"]
        assert row["loss"] == pytest.approx(-row["reward"], abs=1e-6)
        assert row["reward_std"] > 0
        assert row["diversity"] > 0
    assert gap(*runs) < 1e-4


def test_rewards_that_compare_the_samples_of_a_prompt_see_whole_groups(model: Path, tmp_path: Path) -> None:
    options = {"steps": 1, "max_grad_norm": 1e6}
    runs = [trained(tmp_path / str(size), model, reward=GROUPED, train={**options, "chunk": size}) for size in (8, 4)]
    assert gap(*runs) < 1e-4
    assert rows(runs[0])[0]["reward"] == pytest.approx(rows(runs[1])[0]["reward"], rel=1e-5)
    assert rows(runs[0])[0]["missing"] == 0
    with pytest.raises(ValueError, match="srpo scores samples chunk by chunk, and tiny_run:apart compares samples"):
        settings(tmp_path, model, "srpo", reward=GROUPED)


RUN = """
import sys; from pathlib import Path
from align.training.trainer import train; from tiny_run import final_tensors, settings
folder, model = Path(sys.argv[1]), Path(sys.argv[2])
train(settings(folder, model, {"kind": "reward_backprop", "last": [1, 3]},
    train={"steps": 1, "max_grad_norm": 1e6}, prompts={"heldout": None},
    rollout={"prompts": 3, "group": 2}, reward={"kind": "tiny_run:missing_by_content"}))
"""


@pytest.mark.slow
def test_two_processes_draw_and_score_as_one(model: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        launch(count, tmp_path / str(count), RUN, str(tmp_path / str(count)), str(model))
    one, two = tmp_path / "1/run", tmp_path / "2/run"
    assert gap(one, two) < 1e-4
    for key in ("reward", "reward_std", "missing", "loss", "zero_variance_groups"):
        assert rows(one)[0][key] == pytest.approx(rows(two)[0][key], rel=1e-4)


def test_updates_share_a_rollout_and_parts_are_logged(model: Path, tmp_path: Path) -> None:
    direct = {"kind": "tiny_run:redness", "differentiable": True}
    reward = {"kind": "mixture", "parts": {"red": {"reward": direct}, "same": {"reward": direct, "weight": 3.0}}}
    run = trained(tmp_path / "a", model, reward=reward, train={"steps": 1, "updates": 2})
    (row,) = rows(run)
    assert row["missing"] == 0
    assert row["reward/red"] == pytest.approx(row["reward/same"])
    assert row["kl_velocity"] >= 0


def test_a_resumed_run_ends_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    """Steps, noises and the number of steps with gradient come from the seed of the rollout."""
    direct = {"kind": "reward_backprop", "last": [1, 3], "noises": 1}
    rollout = {"sampler": {"kind": "cps", "steps": 3}}
    found = []
    for name, parts in (("whole", (2,)), ("resumed", (1, 2))):
        (tmp_path / name).mkdir()
        for steps in parts:
            config = settings(
                tmp_path / name, model, direct, reward=GAPS, rollout=rollout, train={"steps": steps},
                prompts={"heldout": None},
            )  # fmt: skip
            train(config, resume=steps != parts[0])
        found.append(final_tensors(config))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_a_reward_that_scores_nothing_stops_the_run(model: Path, tmp_path: Path) -> None:
    silent = {"kind": "flaky:falls_silent", "options": {"after": 0}}
    with pytest.raises(RewardError, match=r"gave no score to any sample of this rollout: the reward returned nan"):
        trained(tmp_path / "a", model, reward=silent)


def test_gradients_that_only_a_built_reward_shows_are_refused(model: Path, tmp_path: Path) -> None:
    cases = [
        ({"kind": "tiny_run:redness", "differentiable": None}, "'redness' has none"),
        ({"kind": "tiny_run:compared_in_secret"}, "'compared_in_secret' compares samples"),
    ]
    for number, (reward, says) in enumerate(cases):
        with pytest.raises(RewardError, match=says):
            trained(tmp_path / str(number), model, reward=reward)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"reward": {"kind": "shapes"}}, "follows the reward's gradient, and shapes has none"),
        ({"reward": {"kind": "pairwise"}}, "pairwise"),
        ({"reward": {"kind": "tiny_run:redness", "scope": "batch"}}, "tiny_run:redness compares samples"),
        ({"reward": GROUPED, "train": {"chunk": 6}}, r"train.chunk\s.*should be a multiple of rollout.group = 4"),
        ({"reward": GROUPED, "train": {"updates": 2}}, r"train.updates\s.*an update needs all of them: use 1"),
        ({"rollout": {"kind": "pairs", "file": "a.jsonl"}}, "learns from its own samples: use kind 'online'"),
        ({"rollout": {"overlap": "chunks"}}, "samples and scores in its loss: leave this out"),
        ({"rollout": {"filter": {}}}, "samples and scores in its loss: leave this out"),
        ({"recipe": {"last": 4}}, "recipe.last"),
        ({"recipe": {"last": [3, 2]}}, "at most 3, the sampler's steps"),
        ({"recipe": {"remaining": [1, 4]}}, "recipe.remaining"),
        ({"recipe": {"last": 0}}, "greater than or equal to 1"),
        ({"recipe": {"bridge": 3, "remaining": [1, 2]}}, r"recipe.bridge\s.*should be at most 2"),
        ({"recipe": {"bridge": 2, "last": 2}}, r"recipe.last\s.*leave it out with bridge"),
        ({"recipe": {"bridge": 2, "kl": 0.1}}, r"recipe.kl\s.*leave it out with bridge"),
    ],
)
def test_what_does_not_go_together_is_said(sections: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    given = dict(sections)
    recipe = {"kind": "reward_backprop", **given.pop("recipe", {})}
    with pytest.raises(ValueError, match=says):
        settings(tmp_path, model, recipe, **given)
