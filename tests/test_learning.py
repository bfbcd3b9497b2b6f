"""Every recipe raises its reward on held-out prompts within a few updates, and none does at learning rate 0.

The reward is brightness: gold needs more updates than a quick test has time for (docs/learning.md), and is asked for
in the slow tests. The gains asked for are about a third of those seen, since another processor draws other samples.
What full runs reach is measured by ``benchmarks/learning.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import some_slow

from align.config.load import load_config
from align.training.trainer import train

CONFIGS = Path(__file__).parent.parent / "configs"

SHORT = ["evaluate.every=0", "samples.count=0", "checkpoint.every=0", "train.ema=0", "evaluate.role=policy"]
FEW = ["evaluate.prompts=128", "train.schedule=constant"]
BRIGHTNESS = ["reward={kind: tiny_run:brightness}", "rollout.prompts=4", "evaluate.prompts=32"]
DIRECT = ["reward={kind: tiny_run:mean_pixel, differentiable: true}", *BRIGHTNESS[1:]]
NEW = "dense: null, strict: null, clip: null, a: {reward: tiny_run:brightness}, b: {reward: tiny_run:mean_pixel}"
TWO = [f"reward={{kind: mixture, parts: {{{NEW}}}}}"]
TRUSTED = ["reward={kind: tiny_run:with_distance}"]
REGIONS = "reward={kind: 'tiny_run:BrightRegions'}"
FAST: dict[str, tuple[float, list[str]]] = {  # smallest rise of the reward, overrides
    "nft": (0.1, [*BRIGHTNESS, "train.lr=3e-3", "train.steps=3"]),
    "grpo": (0.05, [*BRIGHTNESS, "train.lr=4e-3", "train.steps=4"]),
    "prdp": (0.05, [*BRIGHTNESS, "train.lr=4e-3", "train.steps=4"]),
    "flow_rwr": (0.12, [*BRIGHTNESS, "train.lr=3e-3", "train.steps=3"]),
    "flow_dpo": (0.12, [*BRIGHTNESS, "train.lr=3e-3", "train.steps=3"]),
    "gapo": (0.12, [*BRIGHTNESS, "train.lr=3e-3", "train.steps=3"]),
    "mm_dpo": (0.12, [*BRIGHTNESS, "train.lr=3e-3", "train.steps=3"]),
    "rpo": (0.12, [*BRIGHTNESS, "train.lr=3e-3", "train.steps=3"]),
    "srum": (0.05, [REGIONS, *BRIGHTNESS[1:], "train.lr=3e-3", "train.steps=3"]),
    "awm": (0.1, [*BRIGHTNESS, "train.lr=3e-3", "train.steps=3"]),
    "dgpo": (0.1, [*BRIGHTNESS, "train.lr=3e-3", "train.steps=3"]),
    "crd": (0.1, [*BRIGHTNESS, "train.lr=3e-3", "train.steps=3"]),
    "vgpo": (0.05, [*BRIGHTNESS, "train.lr=4e-3", "train.steps=4"]),
    "vpo": (0.06, [*TWO, "recipe.set_size=2", *BRIGHTNESS[1:], "train.lr=4e-3", "train.steps=4"]),
    "paco": (0.02, [*BRIGHTNESS, "train.lr=4e-3", "train.steps=4"]),
    "adv_grpo": (0.05, [*BRIGHTNESS, "train.lr=4e-3", "train.steps=4"]),
    "prefpaint": (0.02, [*TRUSTED, *BRIGHTNESS[1:], "train.lr=4e-3", "train.steps=4"]),
    "srpo": (0.05, [*DIRECT, "train.lr=3e-3", "train.steps=4"]),
    "instruct_video": (0.05, [*DIRECT, "train.lr=3e-3", "train.steps=3"]),
    "np_edit": (0.05, [*DIRECT, "recipe.judge=1", "recipe.matching=0", "train.lr=3e-3", "train.steps=3"]),
    "reward_backprop": (0.1, [*DIRECT, "recipe.last=1", "train.lr=3e-3", "train.steps=3"]),
}
SLOW: dict[str, tuple[float, list[str]]] = {
    "nft": (0.015, ["train.steps=9", "rollout.prompts=16"]),
    "flow_dpo": (0.02, ["train.steps=7"]),
    "edit_r1": (0.02, ["train.steps=8"]),
    "re_dmd": (0.05, ["train.steps=16"]),
    "texforce": (0.02, ["train.steps=6", "rollout.prompts=12"]),
}


def run(recipe: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Summary of a run of the recipe's shipped config, on pictures where there is one."""
    config = next(file for file in sorted(CONFIGS.glob(f"shapes*/{recipe}.yaml")))
    return train(load_config(config, [*SHORT, *overrides, f"out={folder / recipe}"]))


@pytest.mark.few(2)
@pytest.mark.parametrize("recipe", some_slow(FAST))
def test_a_few_updates_raise_the_reward_on_held_out_prompts(recipe: str, tmp_path: Path) -> None:
    rise, overrides = FAST[recipe]
    summary = run(recipe, tmp_path, *FEW, *overrides)
    assert summary["reward_after"] > summary["reward_before"] + rise


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SLOW)
def test_more_updates_raise_gold(recipe: str, tmp_path: Path) -> None:
    rise, overrides = SLOW[recipe]
    summary = run(recipe, tmp_path, *FEW, *overrides)
    assert summary["gold_after"] > summary["gold_before"] + rise


@pytest.mark.few(2)
@pytest.mark.parametrize("recipe", some_slow([*FAST, "edit_r1", "re_dmd", "texforce", "opd"]))
def test_learning_rate_zero_raises_nothing(recipe: str, tmp_path: Path) -> None:
    one = ["evaluate.prompts=12", "rollout.prompts=2", "train.steps=1", "train.lr=0"]
    summary = run(recipe, tmp_path, *FEW, *one, *(TRUSTED if recipe == "prefpaint" else []))
    assert summary["reward_after"] == summary["reward_before"]
    assert summary["gold_after"] == summary["gold_before"]
