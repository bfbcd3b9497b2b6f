"""Held-out scores: prompt by prompt on disk, the same however the work is divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import RECIPES, settings, some_slow

from align.config import registry
from align.data.media import from_bytes
from align.evaluation.evaluate import Evaluation, evaluate_run, scored
from align.evaluation.spread import Spread
from align.rollout.rollout import diversity
from align.runs import checkpoint
from align.runs.per_prompt import PromptScores, kind_of, read_scores, scored_steps, write_scores
from align.training.trainer import train
from alignflow.errors import RunFolderError
from rewards import parse
from rewards.base import RewardError
from rewards.scopes import has_parts, known_scope
from rewards.serving import wire


def test_every_evaluation_keeps_its_scores_prompt_by_prompt(model: Path, tmp_path: Path) -> None:
    table = tmp_path / "held_out.jsonl"
    rows = [{"prompt": f"a cat {n}", "tag": "cats" if n % 2 else ""} for n in range(5)]
    table.write_text("\n".join(map(json.dumps, rows)))
    config = settings(
        tmp_path, model, prompts={"heldout": str(table)}, evaluate={"prompts": 5},
        reward={"kind": "tiny_run:missing_by_content"},
    )  # fmt: skip
    train(config)
    logged = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    evals = {row["step"]: row for row in logged if row["event"] == "eval"}
    assert scored_steps(config.run_dir) == sorted(evals) == [0, 2, 3]
    for step, row in evals.items():
        kept = read_scores(config.run_dir, step)
        assert kept is not None
        assert [one.prompt for one in kept] == [row["prompt"] for row in rows]
        assert [one.kind for one in kept] == [None, "cats", None, "cats", None]
        known = [value for one in kept if (value := one.scores["reward"]) is not None]
        assert sum(known) / len(known) == pytest.approx(row["scores"]["reward"])
        assert len(kept) - len(known) == row["missing"]["reward"]
        assert all(("reward" in one.reasons) == (one.scores["reward"] is None) for one in kept)
    assert [one.seed for one in read_scores(config.run_dir, 0)] == [one.seed for one in read_scores(config.run_dir, 3)]


def test_what_a_resumed_run_forgets_is_forgotten_prompt_by_prompt_too(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, checkpoint={"every": 2, "keep": 2})
    train(config)
    for step in checkpoint.list_steps(config.run_dir / "checkpoints")[1:]:
        (config.run_dir / f"checkpoints/step-{step:06d}").rename(tmp_path / "gone")
    before = {step: read_scores(config.run_dir, step) for step in scored_steps(config.run_dir)}
    write_scores(config.run_dir, 99, "policy", before[0])
    train(config, resume=True)
    assert {step: read_scores(config.run_dir, step) for step in scored_steps(config.run_dir)} == before


def test_a_line_counts_missing_scores_and_says_why_there_are_none() -> None:
    gone, some, all_ = torch.full((4,), torch.nan), torch.tensor([0.25, torch.nan, 0.25, 0.25]), torch.ones(4)
    scores, reasons = (
        {"a": gone, "b": some, "c": all_},
        {"a": dict.fromkeys(range(4), "OSError: no\nkey"), "b": {1: "?"}},
    )
    result = Evaluation(["p"] * 4, [0] * 4, scores, torch.empty(0), 0.0, 0.0, reasons=reasons)
    assert scored(result, "a") == "no score (OSError: no key)"
    assert scored(result, "b") == "0.250 (3 of 4 scored)"
    assert scored(result, "c") == "1.000"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert read_scores(tmp_path, 3) is None
    row = PromptScores("a", 1, {"gold": None}, {"gold": "away"}, "cats")
    path = write_scores(tmp_path, 3, "ema", [row])
    assert read_scores(tmp_path, 3) == [row]
    for content in ("{", "[]", '{"prompts": [{"prompt": 1}]}'):
        path.write_text(content)
        with pytest.raises(RunFolderError, match=r"step-000003\.json is damaged"):
            read_scores(tmp_path, 3)


def test_a_kind_is_text_or_a_number() -> None:
    assert kind_of({"tag": "counting", "kind": ""}) == "counting"
    assert kind_of({"category": 3}) == "3"
    assert kind_of({"kind": ["a"]}) is None
    assert kind_of({}) is None


def test_the_spread_does_not_depend_on_chunks() -> None:
    stored = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    media = from_bytes(stored)
    for size in (1, 3, 7):
        spread = Spread()
        for part in media.split(size):
            spread.add(part)
        assert spread.value() == pytest.approx(diversity(stored, torch.zeros(7)), rel=1e-6)
    assert Spread().value() == 0


def mixture(normalise: str, **options: Any) -> dict[str, Any]:
    parts = {
        "red": {"reward": {"kind": "tiny_run:redness"}, "normalise": normalise},
        "bright": {"reward": {"kind": "tiny_run:brightness"}, "weight": 0.5},
    }
    return {"kind": "mixture", "parts": parts, **options}


@pytest.mark.parametrize("normalise", ["group", "batch"])
def test_a_mixture_that_compares_is_shown_by_its_parts(normalise: str, model: Path, tmp_path: Path) -> None:
    found = {}
    for chunk in (1, 256):
        folder = tmp_path / str(chunk)
        folder.mkdir()
        config = settings(folder, model, reward=mixture(normalise), evaluate={"chunk": chunk}, train={"steps": 1})
        summary = train(config)
        (row, after) = (
            one for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()
            if (one := json.loads(line))["event"] == "eval"
        )  # fmt: skip
        assert row["scores"].keys() == {"reward/red", "reward/bright"}
        assert abs(row["scores"]["reward/red"]) > 1e-4
        assert row["stderr"]["reward/bright"] > 0
        assert summary["reward_before"] is None
        parts = summary["reward_parts"]
        assert parts.keys() == {"red", "bright"}
        assert parts["red"]["before"] == row["scores"]["reward/red"]
        assert parts["red"]["after"] == after["scores"]["reward/red"]
        assert parts["bright"]["after_stderr"] == after["stderr"]["reward/bright"]
        found[chunk] = row["scores"]
        assert evaluate_run(config)["scores"] == pytest.approx(row["scores"], abs=1e-6)
    assert found[1] == pytest.approx(found[256], abs=1e-6)


def test_what_has_no_parts_is_left_out_where_it_is_trained_and_refused_elsewhere(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = {"kind": "tiny_run:redness", "scope": "group"}
    config = settings(
        tmp_path, model, reward=compared, evaluate={"rewards": {"light": {"kind": "tiny_run:brightness"}}}
    )
    summary = train(config)
    assert summary["reward_before"] is None
    assert "held-out reward: 'redness' compares the samples of a prompt" in capsys.readouterr().out
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["scores"].keys() == {"light"} for row in rows if row["event"] == "eval")
    alone_too = {"kind": "tiny_run:compared_in_secret"}
    with pytest.raises(RewardError, match=r"evaluate.rewards.x: 'compared_in_secret' compares the samples"):
        train(settings(tmp_path, model, out=str(tmp_path / "b"), evaluate={"rewards": {"x": alone_too}}))
    with pytest.raises(ValueError, match=r"evaluate.rewards.x\s+compares samples"):
        settings(tmp_path, model, evaluate={"rewards": {"x": {"kind": "pairwise"}}})
    with pytest.raises(ValueError, match=r"evaluate.rewards.x\s+compares samples"):
        settings(tmp_path, model, evaluate={"rewards": {"x": mixture("group")}, "gold": "x"})
    settings(tmp_path, model, evaluate={"rewards": {"x": mixture("group")}})


def test_parts_of_parts_have_their_names_and_survive_a_server() -> None:
    inner = {"kind": "consistent", "reward": {"kind": "tiny_run:redness"}}
    tree = mixture("none")
    tree["parts"]["near"] = {"reward": inner}
    tree["parts"]["met"] = {"reward": {"kind": "tiny_run:compared_in_secret"}}
    assert known_scope(parse(tree)) == "group"
    assert has_parts(parse(tree))
    reward = parse({**tree, "parts": {name: part for name, part in tree["parts"].items() if name != "near"}}).build()
    assert reward.scope == "group"
    assert reward.apart == ("red", "bright")
    outer = parse({"kind": "mixture", "parts": {"all": {"reward": mixture("batch")}}}).build()
    assert outer.apart == ("all/red", "all/bright")
    assert wire.read_description(wire.describe(outer, "x")).apart == ["all/red", "all/bright"]
    media = torch.rand(3, 3, 4, 4)
    scores = outer(media, ["a", "b", "c"])
    assert all(part in scores.parts for part in outer.apart)


def test_wrappers_compare_as_what_they_wrap() -> None:
    pool = parse({"kind": "pool", "reward": {"kind": "pairwise"}})
    assert known_scope(pool) == "group"
    assert not has_parts(pool)
    assert has_parts(parse({"kind": "placed", "reward": mixture("group")}))
    assert known_scope(parse({"kind": "unified_reward", "format": "think"})) == "group"
    assert known_scope(parse({"kind": "unified_reward"})) == "sample"
    assert known_scope(parse(mixture("none", how="log_tamed"))) == "batch"


@pytest.mark.parametrize("recipe", some_slow(RECIPES))
def test_a_group_of_one_is_refused_in_words(recipe: str, model: Path, tmp_path: Path) -> None:
    if not registry.recipes()[recipe].compares_group:
        assert settings(tmp_path, model, recipe, rollout={"group": 1})
        return
    with pytest.raises(ValueError, match=r"rollout.group\s.*at least 2 samples per prompt"):
        settings(tmp_path, model, recipe, rollout={"group": 1})
