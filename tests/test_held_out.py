"""Held-out scores: prompt by prompt on disk, the same however the work is divided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import settings

from align import checkpoint
from align.errors import RunFolderError
from align.per_prompt import PromptScores, kind_of, read_scores, scored_steps, write_scores
from align.rollout import diversity
from align.spread import Spread
from align.trainer import train


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
    media = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for size in (1, 3, 7):
        spread = Spread()
        for part in media.split(size):
            spread.add(part)
        assert spread.value() == pytest.approx(diversity(media, torch.zeros(7)), rel=1e-6)
    assert Spread().value() == 0
