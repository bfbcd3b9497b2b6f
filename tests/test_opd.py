"""On-policy distillation: the KL to teachers on the student's own steps, with LoRAs that are never trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_learners import bench_of, drawn, shake
from tiny_run import final_tensors, policy_gap, settings

from align.checking.check import check_files
from align.maths import losses
from align.recipes.base import Point
from align.training.trainer import train
from alignflow.errors import ConfigError


@pytest.fixture
def lora(model: Path, tmp_path: Path) -> Path:
    """The LoRA of a short run."""
    (tmp_path / "teacher").mkdir()
    config = settings(tmp_path / "teacher", model, train={"steps": 1, "lr": 0.1}, prompts={"heldout": None})
    train(config)
    return config.run_dir / "lora"


def test_the_loss_is_the_kl_of_the_steps(model: Path, lora: Path, tmp_path: Path) -> None:
    """``mean (mu - mu_T)^2 / (2 std^2)``, with the ``(mu - mu_T)`` of Flow-SDE as a multiple of ``v - v_T``."""
    teachers = [{"guidance": 2.0}, {"lora": str(lora), "weight": 0.5}]
    config = settings(tmp_path, model, {"kind": "opd", "teachers": teachers})
    generator, bench = bench_of(config)
    policy = bench.learners["policy"]
    shake(bench.__class__(generator, {"policy": policy}))  # the student's weights alone
    rollout = drawn(config, generator)
    recipe = config.recipe
    terms = recipe.terms(rollout, torch.zeros(8))
    with bench.acting("policy"):
        loss = recipe.loss(terms, rollout, bench)
    path, n, s = rollout.path, terms.sample, terms.slot
    x, t, t_next = path.x[n, s], path.t[s], path.t_next[s]
    v = bench.velocity("policy", Point(x, t, rollout.cond_of(n)))
    wanted = torch.zeros(len(terms))
    for name, guidance, weight in (("reference", 2.0, 1.0), ("teacher_2", 1.0, 0.5)):
        other = bench.velocity(name, Point(x, t, rollout.cond_of(n), guidance))
        noise = 0.7 * (t / (1 - torch.where(t >= 1, path.t_second, t))).sqrt()
        factor = (t_next - t) * (1 + noise.square() * (1 - t) / (2 * t))
        wanted += weight * factor.square() * losses.mse(v, other) / (2 * noise.square() * (t - t_next))
    torch.testing.assert_close(loss.value, wanted.detach(), atol=1e-5, rtol=1e-4)
    assert (loss.value > 0).all()
    torch.testing.assert_close(loss.metrics["teacher_kl"], loss.value.detach())


def test_a_student_that_is_its_teacher_stands_still(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, {"kind": "opd", "teachers": [{}]}, train={"weight_decay": 0.0})
    summary = train(config)
    assert summary["status"] == "finished"
    assert all(not value.any() for name, value in final_tensors(config).items() if "lora_B" in name)


def test_the_policy_gradient_is_that_of_grpo(model: Path, tmp_path: Path) -> None:
    """With the base as the teacher the KL has no gradient at the start."""
    found = {}
    for name, recipe in (
        ("grpo", {"kind": "grpo"}),
        ("opd", {"kind": "opd", "teachers": [{}], "policy_gradient": 1.0}),
    ):
        (tmp_path / name).mkdir()
        config = settings(tmp_path / name, model, recipe, train={"steps": 1}, prompts={"heldout": None})
        train(config)
        found[name] = final_tensors(config)
    assert policy_gap(found["grpo"], found["opd"]) < 1e-6


def test_teachers_are_not_trained_and_a_run_resumes_to_the_same_bits(model: Path, lora: Path, tmp_path: Path) -> None:
    recipe = {"kind": "opd", "teachers": [{"lora": str(lora)}, {"guidance": 2.0}], "policy_gradient": 0.5}
    found = []
    for name, parts in (("whole", (2,)), ("resumed", (1, 2))):
        (tmp_path / name).mkdir()
        for steps in parts:
            config = settings(tmp_path / name, model, recipe, train={"steps": steps}, prompts={"heldout": None})
            train(config, resume=steps != parts[0])
        found.append(config)
    for learner in ("policy", "teacher_1"):
        one, two = (final_tensors(config, learner) for config in found)
        assert policy_gap(one, two) == 0
    _, bench = bench_of(found[0])
    given = {f"policy/{name}": value.detach() for name, value in bench.learners["teacher_1"].parameters}
    assert policy_gap(given, final_tensors(found[0], "teacher_1")) == 0
    assert any(value.any() for name, value in given.items() if "lora_B" in name)
    assert any(value.any() for name, value in final_tensors(found[0]).items() if "lora_B" in name)


def test_the_distance_to_the_teacher_falls(model: Path, lora: Path, tmp_path: Path) -> None:
    recipe = {"kind": "opd", "teachers": [{"lora": str(lora)}]}
    options = {"steps": 6, "lr": 2e-2, "schedule": "constant"}
    config = settings(tmp_path, model, recipe, train=options, prompts={"heldout": None})
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    kl = [row["teacher_kl"] for row in rows if row["event"] == "train"]
    assert kl[-1] < 0.7 * kl[0]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"recipe": {"teachers": []}}, "at least 1 item"),
        ({"recipe": {"policy_gradient": 1.0}, "rollout": {"group": 1}}, "policy_gradient needs at least 2 samples"),
        ({"rollout": {"sampler": {"kind": "ode"}}}, "opd needs a stochastic sampler"),
        (
            {"recipe": {"teachers": [{"lora": "a.safetensors"}]}, "policy": {"kind": "full"}},
            "opd holds the LoRA of teacher_1 on the same network: use lora",
        ),
    ],
)
def test_what_does_not_go_together_is_said(sections: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    given = dict(sections)
    with pytest.raises(ValueError, match=says):
        settings(tmp_path, model, {"kind": "opd", **given.pop("recipe", {})}, **given)


def test_a_teacher_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, {"kind": "opd", "teachers": [{"lora": str(tmp_path / "gone")}]})
    with pytest.raises(ConfigError, match=r"recipe \(teacher_1\): no file or folder .*gone"):
        check_files(config)
    with pytest.raises(ValueError, match="gone"):
        train(config)
