"""Completion of settings, kinds and values, from the function and through the shell's interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.config.completing import complete

ROOT = Path(__file__).parent.parent
NFT, FK = str(ROOT / "configs/shapes/nft.yaml"), str(ROOT / "configs/shapes/search_fk.yaml")


@pytest.mark.parametrize(
    ("command", "words", "start", "found"),
    [
        ("train", [NFT], "tr", ["train.", "trackers="]),
        ("train", [NFT], "recipe.b", ["recipe.beta=", "recipe.behaviour_decay="]),
        ("train", [NFT, "recipe.kind=grpo"], "recipe.r", ["recipe.ratio_clip=", "recipe.ratio="]),
        ("train", [NFT, "recipe.kind", "=", "grpo"], "recipe.r", ["recipe.ratio_clip=", "recipe.ratio="]),
        ("train", [NFT], "recipe.kind=g", ["recipe.kind=gapo", "recipe.kind=grpo"]),
        (
            "train",
            [NFT],
            "train.gradient_checkpointing=",
            [f"train.gradient_checkpointing={b}" for b in ("true", "false")],
        ),
        ("train", [NFT, "train.schedule"], "=", ["constant", "cosine", "linear"]),
        ("train", [NFT, "train.schedule", "="], "co", ["constant", "cosine"]),
        ("train", [NFT], "train.lr", ["train.lr=0.0003"]),
        ("train", [NFT], "evaluate.rewards.gold.kind=pick", ["evaluate.rewards.gold.kind=pick_score"]),
        ("train", ["nothing.yaml"], "reward.kind=pick", ["reward.kind=pick_score"]),
        ("search", [FK], "search.part", ["search.particles=4"]),
        ("check", [FK], "bud", ["budget.network_calls=", "budget.decodes=", "budget.reward_calls=", "budget.seconds="]),
        ("train", [NFT], "trian.", []),
    ],
)
def test_what_a_word_may_be(command, words, start, found):
    given = complete(command, words, start)
    assert [value for value, _ in given] == found


def test_settings_come_with_their_description():
    assert dict(complete("train", [NFT], "recipe.b"))["recipe.beta="].startswith("distance of v+ and v-")


@pytest.mark.parametrize(
    ("line", "count", "found"),
    [
        (f"alignflow train {NFT} tr", 3, "train. trackers="),
        ("alignflow show reward pic", 3, "pick_score"),
        ("alignflow show rec", 2, "recipe"),
    ],
)
def test_the_shell_gets_it(line, count, found):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_ALIGNFLOW_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(count)
    code = "import sys; sys.argv = ['alignflow']; from align.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == found.split()
