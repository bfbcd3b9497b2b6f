"""Every recipe raises gold on held-out prompts of the embedded world, and none does at learning rate 0.

The fast versions are short runs of the shipped configs; the slow ones are what ``docs/learning.md`` reports.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from align.config import load_config
from align.trainer import train

CONFIGS = Path(__file__).parent.parent / "configs" / "shapes"

SHORT = ["evaluate.every=0", "samples.count=0", "checkpoint.every=0", "train.ema=0", "evaluate.role=policy"]
SMALL = ["rollout.prompts=8", "rollout.group=8", "evaluate.prompts=96", "train.steps=6"]
FAST: dict[str, list[str]] = {
    "nft": ["train.lr=1e-3", "recipe.times=4"],
    "grpo": ["train.lr=1e-3"],
    "flow_rwr": ["train.lr=1e-3"],
    "flow_dpo": ["train.lr=1e-3"],
}


def run(recipe: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Summary of a run of the recipe's shipped config."""
    return train(load_config(CONFIGS / f"{recipe}.yaml", [*overrides, f"out={folder / recipe}"]))


@pytest.mark.parametrize("recipe", FAST)
def test_a_few_updates_raise_held_out_gold(recipe: str, tmp_path: Path) -> None:
    summary = run(recipe, tmp_path, *SHORT, *SMALL, *FAST[recipe])
    assert summary["gold_after"] > summary["gold_before"] + 0.02


@pytest.mark.parametrize("recipe", FAST)
def test_learning_rate_zero_raises_nothing(recipe: str, tmp_path: Path) -> None:
    tiny = ["rollout.prompts=2", "rollout.group=4", "evaluate.prompts=32", "train.steps=2", "recipe.times=2"]
    overrides = [item for item in tiny if recipe != "grpo" or not item.startswith("recipe")]
    summary = run(recipe, tmp_path, *SHORT, *overrides, "train.lr=0")
    assert summary["gold_after"] == summary["gold_before"]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "rise"), [("nft", 0.08), ("grpo", 0.08), ("flow_rwr", 0.05), ("flow_dpo", 0.08)])
def test_three_seeds_raise_held_out_gold(recipe: str, rise: float, tmp_path: Path) -> None:
    rises = []
    for seed in (0, 1, 2):
        summary = run(recipe, tmp_path / str(seed), "evaluate.every=0", f"seed={seed}", f"evaluate.seed={seed}")
        rises.append(summary["gold_after"] - summary["gold_before"])
    assert min(rises) > 0
    assert statistics.mean(rises) >= rise
