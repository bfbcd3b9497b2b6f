"""The leaderboard: budgets, resumption of its runs, and its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import leaderboard
from benchmarks.helpers import leaderboard_page


def record(recipe: str, seed: int, before: float, after: float, **changed: Any) -> dict[str, Any]:
    score = {"before": before, "after": after, "error": 0.01}
    return {
        "world": "shapes", "recipe": recipe, "seed": seed, "calls": 1000, "seconds": None, "overrides": [], "steps": 4,
        "spent_calls": 990, "spent_seconds": 12.0, "scores": {"gold": score, "reward": score}, "curve": [],
        "diversity": [0.2, 0.1], "drift": 0.05, **changed,
    }  # fmt: skip


def test_the_page_ranks_recipes_by_the_mean_change_of_their_seeds(tmp_path: Path) -> None:
    low = {
        "gold": {"before": 0.3, "after": 0.31, "error": 0.02},
        "reward": {"before": 0.2, "after": 0.5, "error": 0.02},
    }
    records = [record("b", 0, 0.3, 0.4), record("b", 1, 0.4, 0.6), record("a", 0, 0, 0, scores=low)]
    leaderboard_page.write_page(records, tmp_path / "leaderboard.md")
    rows = [line for line in (tmp_path / "leaderboard.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == [
        "| `b` | 4 | 0.300 to 0.400, 0.400 to 0.600 | +0.150 ± 0.014 |  | 0.50 | 0.050 | 990 | 12 |",
        "| `a` | 4 | 0.300 to 0.310 | +0.010 ± 0.039 | 0.200 to 0.500 | 0.50 | 0.050 | 990 | 12 |",
    ]
    picture = (tmp_path / "images" / "leaderboard-shapes-1000-calls.svg").read_text()
    assert picture.index(">b<") < picture.index(">a<")


@pytest.mark.slow
def test_runs_keep_to_their_budget_and_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard, "RUNS", tmp_path / "runs")
    results = tmp_path / "results" / "leaderboard.json"
    small = ["rollout.prompts=1", "rollout.group=2", "evaluate.prompts=2", "rollout.sampler.steps=2"]
    words = ["leaderboard", "--world", "shapes", "--calls", "100", "--seeds", "0", "--results", str(results)]

    def run(*recipes: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [*words, "--recipes", *recipes, "--set", *small])
        leaderboard.main()
        return json.loads(results.read_text())

    (first,) = run("flow_rwr")
    assert 0 < first["spent_calls"] <= 100 < first["spent_calls"] * (first["steps"] + 1) / first["steps"]
    assert len(first["curve"]) == 3
    again = run("flow_rwr", "nft")
    assert again[0] == first
    assert again[1]["recipe"] == "nft"
    assert list((tmp_path / "runs").iterdir()) == []
    assert "`nft`" in results.with_suffix(".md").read_text()


def test_a_recipe_of_the_image_world_carries_its_settings_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    config = leaderboard.config_of("shapes-video", "grpo", ["train.steps=7"])
    assert config.generator.path == "shapes-video"
    assert (config.recipe.kind, config.train.lr, config.train.steps) == ("grpo", 1.5e-3, 7)
    assert config.rollout.kind == "online"
    assert config.rollout.same_noise
    assert config.reward is not None
    assert config.reward.kind == "shapes_video"


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    docs = Path(__file__).parent.parent / "docs"
    leaderboard_page.write_page(json.loads((docs / "leaderboard.json").read_text()), tmp_path / "leaderboard.md")
    assert (tmp_path / "leaderboard.md").read_text() == (docs / "leaderboard.md").read_text()
