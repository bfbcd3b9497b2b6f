"""Several learners on one network: none moves another, roles are one learner each, and runs go on to the bit.

Re-DMD is the recipe with two: the policy, a few-step student, and the critic, which models the student's samples.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from pydantic import ValidationError
from safetensors.torch import load_file
from test_training import optimizer_moments
from tiny_run import final_tensors, settings

from align.checking import estimate, fitting
from align.checking.check import geometry
from align.config.load import dump_config
from align.config.settings import Config
from align.evaluation.evaluate import evaluate_run
from align.maths import losses
from align.policy.build import add_trained, build_generator, build_roles, contexts
from align.policy.lora import add_lora
from align.recipes.base import Recipe
from align.rollout.bench import Bench, Point
from align.rollout.rollout import Scored
from align.rollout.sources import OnlineSource, Share
from align.runs import checkpoint
from align.training.trainer import train
from generators.base import Generator
from rewards.base import Scores


def bench_of(config: Config) -> tuple[Generator, Bench]:
    generator = build_generator(config.generator, config.memory, "cpu", training=True)
    add_trained(config, generator)
    return generator, Bench(generator, build_roles(config, generator), only=contexts(config, generator))


def shake(bench: Bench, seed: int = 1) -> None:
    """Change the weights of every learner, each to values of its own."""
    source = torch.Generator().manual_seed(seed)
    for roles in bench.learners.values():
        for _, value in roles.parameters:
            value.data += 0.1 * torch.randn(value.shape, generator=source)
        roles.policy_changed()


def drawn(config: Config, generator: Generator, scores: list[float] | None = None) -> Scored:
    with torch.no_grad():
        samples = OnlineSource(config, generator, Share(), config.recipe.needs)(0)
    values = torch.tensor(scores) if scores else torch.linspace(0, 1, len(samples.seeds))
    return samples.become(Scored, scores=Scores(values))


# -- the network of several LoRAs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("acting", ["policy", "critic"])
def test_a_role_is_the_network_with_that_lora_alone(acting: str, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "re_dmd")
    generator, bench = bench_of(config)
    shake(bench)
    point = Point(generator.noise([1, 2]), torch.tensor([0.3, 0.8]), generator.encode(["a cat", "a dog"]))
    with bench.acting(acting):
        found = {role: bench.velocity(role, point) for role in ("policy", "critic", "reference")}
    assert {role: value.requires_grad for role, value in found.items()} == {
        role: role == acting for role in ("policy", "critic", "reference")
    }
    for role, velocity in found.items():
        alone = build_generator(config.generator, config.memory, "cpu")
        if role != "reference":
            mine = dict(bench.learners[role].parameters)
            for name, value in add_lora(alone, config.policy.rank, config.policy.rank):  # type: ignore[union-attr]
                value.data.copy_(mine[name.replace(".default.", ".default." if role == "policy" else ".critic.")])
        with torch.no_grad():
            expected = alone.velocity(point.x, point.t, point.cond)
        assert torch.equal(velocity.detach(), expected)
    assert torch.equal(found["policy"].detach(), bench.velocity("policy", point).detach())  # as outside of an update
    values = list(found.values())
    assert not any(torch.equal(values[i], values[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_of_one_learner_has_no_gradient_for_another(checkpointing: bool, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "re_dmd")
    generator, bench = bench_of(config)
    if checkpointing:
        generator.backbone.enable_gradient_checkpointing()  # type: ignore[operator]
    shake(bench)
    rollout = drawn(config, generator)
    recipe = config.recipe
    credit = recipe.credit(rollout.scores, rollout.group)
    for name, learns in recipe.learners().items():
        with bench.acting(name):
            learns.objective.loss(learns.objective.terms(rollout, credit), rollout, bench).value.sum().backward()  # type: ignore[arg-type]
        for other, roles in bench.learners.items():
            given = [value.grad for _, value in roles.parameters]
            assert any(grad is not None and grad.any() for grad in given) == (other == name)
            for _, value in roles.parameters:
                value.grad = None


@pytest.mark.parametrize("still", ["policy", "critic"])
def test_an_update_of_one_learner_leaves_the_others_bits(still: str, model: Path, tmp_path: Path) -> None:
    """A learner at learning rate 0 does not move, though the other does."""
    critic = {"updates": 2, "timesteps": 2, "lr": 0.0 if still == "critic" else 1e-2}
    rate = {"lr": 0.0 if still == "policy" else 1e-2}
    config = settings(tmp_path, model, {"kind": "re_dmd", "critic": critic}, train=rate, prompts={"heldout": None})
    train(config)
    for name in ("policy", "critic"):
        moved = [value for key, value in final_tensors(config, name).items() if "lora_B" in key]
        assert any(bool(value.any()) for value in moved) == (name != still)


def test_gradient_checkpointing_changes_no_gradient_of_any_learner(model: Path, tmp_path: Path) -> None:
    moments: list[list[torch.Tensor]] = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        (tmp_path / name).mkdir()
        options = {"steps": 2, "gradient_checkpointing": checkpointing}
        config = settings(tmp_path / name, model, "re_dmd", train=options, prompts={"heldout": None})
        train(config)
        moments.append([*optimizer_moments(config.run_dir), *optimizer_moments(config.run_dir, "critic")])
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_terms_stand_before_every_step_with_what_the_student_predicts_there(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, {"kind": "re_dmd", "critic": {"timesteps": 6}})
    generator, bench = bench_of(config)
    rollout = drawn(config, generator)
    terms = config.recipe.learners()["critic"].objective.terms(rollout, torch.ones(len(rollout.seeds)))
    x, t, x0 = rollout.at_random_step(terms.sample, terms.slot)
    assert {round(float(value), 4) for value in t} == {round(float(value), 4) for value in generator.times(3)[:3]}
    with torch.no_grad():
        v = bench.velocity("policy", Point(x, t, rollout.cond_of(terms.sample)))
    torch.testing.assert_close(losses.x0_from(x, v, t), x0, atol=1e-5, rtol=1e-5)
    last = t == t.min()
    assert torch.equal(x0[last], rollout.latents[terms.sample[last]])
    own = config.recipe.terms(rollout, torch.ones(len(rollout.seeds)))
    assert not set(own.slot.tolist()) & set(terms.slot.tolist())  # noise that the critic was not trained on


def test_weights_follow_the_reward_and_samples_without_one_weigh_nothing(model: Path, tmp_path: Path) -> None:
    def recipe(**options: Any) -> Recipe:
        return settings(tmp_path, model, {"kind": "re_dmd", "normalise_by": "none", **options}).recipe

    values, group = torch.tensor([0.25, 0.75, math.nan, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    scores = Scores(values, {2: "no score"})
    assert recipe(beta=0.0).credit(scores, group).tolist() == [1] * 5  # plain DMD
    weight = recipe(beta=2.0).credit(scores, group)
    assert (weight[1] / weight[0]).item() == pytest.approx(math.e)  # exp(2 * 0.5)
    assert weight[3:].tolist() == [1, 1]
    assert recipe(beta=2.0, advantage_clip=0.1).credit(scores, group)[1].item() == pytest.approx(math.exp(0.2))
    config = settings(tmp_path, model, "re_dmd")
    rollout = drawn(config, bench_of(config)[0], [math.nan, *[1.0] * 7])
    own, critic = (config.recipe.learners()[name].objective for name in ("policy", "critic"))
    assert own.terms(rollout, torch.ones(8)).weight.tolist() == [0, *[1] * 7]
    assert critic.terms(rollout, torch.ones(8)).weight.tolist() == [1] * 16  # it models all samples


def test_the_student_stands_still_where_critic_and_teacher_agree(model: Path, tmp_path: Path) -> None:
    for guidance in (1.0, 3.0):
        config = settings(tmp_path, model, {"kind": "re_dmd", "guidance": guidance})
        generator, bench = bench_of(config)  # both LoRAs are the base
        rollout = drawn(config, generator)
        terms = config.recipe.terms(rollout, torch.ones(8))
        with bench.acting("policy"):
            loss = config.recipe.loss(terms, rollout, bench)
        assert bool(loss.value.any()) == (guidance != 1)
        assert bool(loss.metrics["mismatch"].any()) == (guidance != 1)


@pytest.mark.parametrize(
    ("sections", "path", "words"),
    [
        ({"policy": {"kind": "full"}}, "policy.kind", "re_dmd trains a critic on the same network: use lora"),
        ({"train": {"precision": "fp16"}}, "train.precision", "re_dmd trains a critic too"),
        ({"rollout": {"sampler": {"kind": "ode", "steps": 3}}}, "rollout.sampler.kind", "needs a stochastic sampler"),
        (
            {"rollout": {"sampler": {"kind": "cps", "steps": 3, "window": {"strategy": "random", "size": 1}}}},
            "rollout.sampler.window",
            "re_dmd trains every step",
        ),
        ({"evaluate": {"sampler": {"steps": 10}}}, "evaluate.sampler.steps", "a student of 3 steps"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    sections: dict[str, Any], path: str, words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(tmp_path, model, "re_dmd", **sections)
    assert path in str(caught.value)
    assert words in str(caught.value)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_of_two_learners(model: Path, tmp_path: Path) -> None:
    """Rows, report, exported LoRA, and the evaluation of the finished run."""
    config = settings(tmp_path, model, "re_dmd", train={"ema": 0.0}, evaluate={"role": "policy"})
    summary = train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if row["event"] == "train"):
        critic = {name for name in row if name.startswith("critic/")}
        assert critic == {"critic/loss", "critic/fm", "critic/grad_norm", "critic/lr"}
        assert all(math.isfinite(row[name]) for name in (*critic, "loss", "mismatch", "grad_norm", "kl_velocity"))
        assert row["critic/lr"] == row["lr"] == 1e-2
    page = (config.run_dir / "report.html").read_text()
    assert all(f"critic/{name}: numbers" in page for name in ("loss", "fm", "grad norm", "lr"))
    stored = load_file(config.run_dir / "lora" / "pytorch_lora_weights.safetensors")
    policy, critic = final_tensors(config), final_tensors(config, "critic")
    assert len(stored) == len(policy) == len(critic) > 0
    for name, value in policy.items():
        key = name.removeprefix("policy/").replace(".default.", ".").removeprefix("transformer.")
        assert torch.equal(stored[f"transformer.{key}"], value)
    again = evaluate_run(config, run_dir=config.run_dir)
    assert again["scores"]["reward"] == pytest.approx(summary["reward_after"], abs=1e-6)


def test_a_run_of_two_learners_goes_on_to_the_bit(model: Path, tmp_path: Path) -> None:
    runs = []
    for name, parts in (("whole", [3]), ("parts", [1, 3])):
        (tmp_path / name).mkdir()
        for steps in parts:
            config = settings(tmp_path / name, model, "re_dmd", train={"steps": steps})
            train(config, resume=steps != parts[0])
        runs.append(config)
    for learner in ("policy", "critic"):
        whole, parts_ = (final_tensors(config, learner) for config in runs)
        assert len(whole) > 0
        assert whole.keys() == parts_.keys()
        assert all(torch.equal(value, parts_[name]) for name, value in whole.items())
    states = []
    for config in runs:
        path = checkpoint.latest(config.run_dir / "checkpoints")
        assert path is not None
        states.append(torch.load(path / "optimizer.pt", weights_only=True)["learners"])
    assert states[0].keys() == {"critic", "policy"}
    assert [state["critic"]["optimizer"]["state"][0]["step"].item() for state in states] == [6, 6]


def test_a_continued_lora_and_prompts_kept_without_their_encoder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    first = settings(tmp_path / "first", model, "re_dmd", prompts={"heldout": None})
    train(first)
    sections: dict[str, Any] = {
        "policy": {"kind": "lora", "init": str(first.run_dir / "lora")}, "memory": {"cache_prompts": "memory"},
    }  # fmt: skip
    config = settings(tmp_path, model, "re_dmd", train={"steps": 1}, prompts={"heldout": None}, **sections)
    train(config)
    names = {name.partition("/")[0] for name in final_tensors(config)}
    assert names == {"policy", "reference", "ema"}  # the teacher is the start, which is not the base
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["mismatch"] > 0


PROCESSES = """
import sys
from pathlib import Path
from align.training.trainer import train
from tiny_run import settings
recipe = {"kind": "re_dmd", "critic": {"updates": 3, "timesteps": 2}}
train(settings(
    Path(sys.argv[1]), Path(sys.argv[2]), recipe, rollout={"prompts": 3, "group": 2},
    train={"steps": 1, "max_grad_norm": 1e6}, evaluate={"every": 0},
    reward={"kind": "tiny_run:missing_by_content"},
))
"""


@pytest.mark.slow
def test_two_processes_equal_one_for_every_learner(model: Path, tmp_path: Path) -> None:
    """Three prompts: the second process begins at sample 4, and parts of an update do not depend on that."""
    moments: dict[int, list[torch.Tensor]] = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        launch(count, folder, PROCESSES, str(folder), str(model))
        moments[count] = [*optimizer_moments(folder / "run"), *optimizer_moments(folder / "run", "critic")]
    assert len(moments[1]) == len(moments[2]) > 0
    gaps = [float((a - b).norm() / (a.norm() + 1e-12)) for a, b in zip(moments[1], moments[2], strict=True)]
    assert max(gaps) < 1e-3


# -- the estimate -----------------------------------------------------------------------------------------------------


def test_the_estimate_counts_the_critic(model: Path, tmp_path: Path) -> None:
    one, two = (settings(tmp_path, model, recipe, train={"ema": 0}, evaluate={"role": "policy"}) for recipe in
                ("grpo", "re_dmd"))  # fmt: skip
    alone, both = ({item.name: item for item in estimate.estimate(config).kept} for config in (one, two))
    _, bench = bench_of(two)
    weights = sum(value.numel() for roles in bench.learners.values() for _, value in roles.parameters)
    assert both["roles"].bytes == 4 * weights == 2 * alone["roles"].bytes
    assert both["optimizer"].bytes == 8 * weights == 2 * alone["optimizer"].bytes
    assert both["gradients"].bytes == alone["gradients"].bytes  # those of one learner at a time
    assert both["rollout"].bytes > alone["rollout"].bytes  # the predictions
    said = "\n".join(fitting.lines(two, "0.1gb"))
    assert fitting.MISFIT in said
    assert "policy, critic: " in said
    assert "of critic and policy" in said
    assert "the critic: 16 terms and 2 optimizer steps per rollout" in geometry(two)
    assert "critic" not in geometry(one)


def test_settings_of_the_critic_are_written_and_read_again(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "re_dmd")
    assert "critic:" in dump_config(config)
    assert Config.model_validate(config.model_dump(mode="json")) == config
