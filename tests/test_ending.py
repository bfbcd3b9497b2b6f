"""Runs that end early: a hacked reward, and evaluations without a better one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_verdict import CLIP, SHAPES, UP, made
from tiny_run import settings

from align.config.sections import Evaluate
from align.report import warnings
from align.report.reading import read_run
from align.report.warnings import hacked
from align.runs.ending import EarlyEnd
from align.training.trainer import train

DOWN = ([0.9, 0.8, 0.7], [0.1, 0.2, 0.1])
EVALUATE = {"gold": "gold", "rewards": {"gold": CLIP}}


def test_the_reward_is_hacked_when_it_rose_and_gold_fell_or_diversity_collapsed(tmp_path: Path) -> None:
    def run(name: str, reward: Any, gold: Any, diversity: list[float]) -> str | None:
        one = made(tmp_path / name, {"gold": gold, "reward": reward}, reward=SHAPES, evaluate=EVALUATE)
        rows = (one.folder / "metrics.jsonl").read_text()
        new = [json.dumps({"event": "train", "step": n + 1, "diversity": d}) for n, d in enumerate(diversity)]
        (one.folder / "metrics.jsonl").write_text(rows + "\n".join(new) + "\n")
        return hacked(read_run(one.folder))

    assert run("fine", UP, UP, [0.2, 0.2, 0.11]) is None
    assert "gold went down" in (run("gold", UP, DOWN, [0.2, 0.2]) or "")
    assert "fell from 0.2 to 0.09" in (run("alike", UP, UP, [0.2, 0.15, 0.09]) or "")
    assert run("both fell", DOWN, DOWN, [0.2, 0.02]) is None


def test_a_run_ends_after_so_many_evaluations_without_a_better_one() -> None:
    end = EarlyEnd(Evaluate(patience=2))
    for step, better in ((0, False), (5, True), (10, False)):
        end.see(step, better, None)
        assert end.reason is None
    end.see(15, False, None)
    assert end.reason == "stopped early at step 15: 2 evaluations in a row without a better one"
    again = EarlyEnd(Evaluate(patience=2))
    again.load(end.state())
    assert again.reason == end.reason
    longer = EarlyEnd(Evaluate(patience=3))
    longer.load(end.state())
    assert longer.reason is None


def test_a_hacked_reward_ends_a_run_only_where_the_config_says_so() -> None:
    for choice in ("warn", "stop"):
        end = EarlyEnd(Evaluate(hacking=choice))
        end.see(5, True, "the trained reward went up")
        assert (end.reason is not None) == (choice == "stop")


def test_a_run_without_progress_stops_with_a_checkpoint_and_stays_stopped(model: Path, tmp_path: Path) -> None:
    def config(patience: int | None) -> Any:
        return settings(
            tmp_path, model, train={"steps": 5, "lr": 0.0}, checkpoint={"every": 5, "best": "reward"},
            evaluate={"every": 1, "prompts": 4, "sampler": {"steps": 3}, "patience": patience},
        )  # fmt: skip

    summary = train(config(2))
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    assert train(config(2), resume=True)["steps"] == 3
    assert train(config(None), resume=True)["steps"] == 5


def test_an_evaluation_with_a_hacked_reward_is_never_the_best(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "hacked", lambda run: "the trained reward went up while gold went down")
    config = settings(
        tmp_path, model, train={"steps": 4, "lr": 1e-2}, checkpoint={"every": 5, "best": "reward"},
        evaluate={"every": 1, "prompts": 4, "sampler": {"steps": 3}, "hacking": "stop"},
    )  # fmt: skip
    summary = train(config)
    assert summary["steps"] == 0
