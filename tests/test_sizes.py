"""Evaluation at another size than the rollouts', for PaCo-RL, and the recipe's defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError
from tiny_run import settings

from align.checking.check import check_files
from align.evaluation.evaluate import evaluate_run, sample_to_folder
from align.recipes.adv_grpo import AdvGRPO
from align.recipes.paco import PaCo
from align.training.trainer import train
from alignflow.errors import ConfigError
from generators.errors import GeneratorError

LARGE = {"evaluate": {"size": [64, 64]}}


def test_evaluation_has_its_own_size(model: Path, tmp_path: Path) -> None:
    """The base's scores are those of a config whose generator has that size; rollouts keep theirs."""
    config = settings(tmp_path, model, train={"steps": 1}, samples={"count": 2, "every": 1}, **LARGE)
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "large").mkdir()
    large = settings(tmp_path / "large", model, generator={"size": [64, 64]})
    assert rows[0]["event"] == "eval"
    assert rows[0]["scores"]["reward"] == pytest.approx(evaluate_run(large)["scores"]["reward"], abs=1e-6)
    small = settings(tmp_path / "large", model)
    assert rows[0]["scores"]["reward"] != pytest.approx(evaluate_run(small)["scores"]["reward"], abs=1e-6)
    assert Image.open(config.run_dir / "samples/step-000000/000.png").size == (64, 64)
    assert evaluate_run(config)["scores"]["reward"] == pytest.approx(rows[0]["scores"]["reward"], abs=1e-6)
    sample_to_folder(config, tmp_path / "drawn")
    assert Image.open(tmp_path / "drawn/000.png").size == (64, 64)


def test_the_size_of_the_rollouts_does_not_change_with_it(model: Path, tmp_path: Path) -> None:
    rewards = []
    for name, sections in (("a", {}), ("b", LARGE)):
        (tmp_path / name).mkdir()
        config = settings(tmp_path / name, model, train={"steps": 2}, **sections)
        train(config)
        rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        rewards.append([row["reward"] for row in rows if row["event"] == "train"])
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"generator": {"kind": "generic", "path": "x"}}, "a pipeline without an adapter samples at one size"),
        (
            {"generator": {"kind": "flux_fill", "path": "x"}, "memory": {"cache_prompts": "memory"}},
            "prompts of flux_fill are cached with their images at one size",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(sections: Any, says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(tmp_path, model, **sections, **LARGE)


def test_a_size_that_the_model_cannot_sample_is_said_before_any_work(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, evaluate={"size": [4096, 4096]})
    with pytest.raises(GeneratorError, match=r"evaluate.size \[4096, 4096\]: height and width must be multiples of"):
        train(config)
    with pytest.raises(ConfigError, match=r"evaluate.size.*multiples of 16; the nearest is \[32, 32\]"):
        check_files(settings(tmp_path, model, evaluate={"size": [24, 24]}))


def test_paco_tames_its_mixtures(model: Path, tmp_path: Path) -> None:
    member = {"reward": {"kind": "tiny_run:redness"}}
    parts = {"a": member, "b": member}
    assert settings(tmp_path, model, "paco", reward={"kind": "mixture", "how": "log_tamed", "parts": parts})
    with pytest.raises(
        ValidationError, match=r"is weighted, but paco mixes rewards by log_tamed: use log_tamed, or grpo"
    ):
        settings(tmp_path, model, "paco", reward={"kind": "mixture", "parts": parts})
    recipe = PaCo()
    assert (recipe.ratio, recipe.normalise_by, recipe.kl) == ("guard", "global", 0)


def test_adv_grpo_has_its_authors_defaults() -> None:
    recipe = AdvGRPO()
    assert (recipe.ratio_clip, recipe.normalise_by, recipe.kl) == (1e-5, "global", 0)
