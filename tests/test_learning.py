"""Every recipe raises its reward on held-out prompts of the embedded world, and none does at learning rate 0.

Brightness is a reward that a few updates can raise with any sound algorithm; for gold the policy has to compose what
the prompt says, which ``nft`` learns fastest. What full runs reach is measured by ``benchmarks/learning.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config import load_config
from align.trainer import train

CONFIGS = Path(__file__).parent.parent / "configs" / "shapes"

SHORT = ["evaluate.every=0", "samples.count=0", "checkpoint.every=0", "train.ema=0", "evaluate.role=policy"]
BRIGHTNESS = [
    "reward={kind: tiny_run:brightness}",
    "rollout.prompts=4",
    "rollout.group=8",
    "evaluate.prompts=48",
    "train.steps=8",
    "train.schedule=constant",
]
FAST: dict[str, list[str]] = {
    "nft": ["train.lr=3e-3", "recipe.times=3"],
    "grpo": ["train.lr=3e-3"],
    "flow_rwr": ["train.lr=3e-3", "recipe.times=3", "rollout.sampler.steps=10"],
    "flow_dpo": ["train.lr=3e-3", "recipe.times=3"],
}


def run(recipe: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Summary of a run of the recipe's shipped config."""
    return train(load_config(CONFIGS / f"{recipe}.yaml", [*SHORT, *overrides, f"out={folder / recipe}"]))


@pytest.mark.parametrize("recipe", FAST)
def test_a_few_updates_raise_the_reward_on_held_out_prompts(recipe: str, tmp_path: Path) -> None:
    summary = run(recipe, tmp_path, *BRIGHTNESS, *FAST[recipe])
    assert summary["reward_after"] > summary["reward_before"] + 0.05


@pytest.mark.parametrize("recipe", FAST)
def test_learning_rate_zero_raises_nothing(recipe: str, tmp_path: Path) -> None:
    summary = run(recipe, tmp_path, *BRIGHTNESS, "train.steps=2", "train.lr=0")
    assert summary["reward_after"] == summary["reward_before"]
    assert summary["gold_after"] == summary["gold_before"]


def test_nft_raises_held_out_gold(tmp_path: Path) -> None:
    summary = run("nft", tmp_path, "train.steps=8", "train.lr=2e-3", "train.schedule=constant", "evaluate.prompts=128")
    assert summary["gold_after"] > summary["gold_before"] + 0.01
