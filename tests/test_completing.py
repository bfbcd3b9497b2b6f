"""Completion of settings, kinds and values, from the function and through the shell's interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align import export
from align.config import completing_names
from align.config.completing import complete
from align.preference import pairing

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


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, one of them in a sweep, with checkpoints; a config beside them."""
    monkeypatch.chdir(tmp_path)
    for run in ("runs/first", "runs/lr/a"):
        for step in (5, 10):
            Path(run, "checkpoints", f"step-{step:06d}").mkdir(parents=True)
        Path(run, "config.yaml").touch()
    Path("runs/notes").mkdir()
    Path("run.yaml").touch()
    return tmp_path


def test_names_of_runs_checkpoints_policies_and_formats(made: Path) -> None:
    assert completing_names.runs("ru") == ["runs/first"]
    assert completing_names.runs("runs/") == ["runs/first", "runs/lr/a"]
    assert completing_names.runs("elsewhere/") == []
    assert completing_names.sources("ru") == ["runs/first", "run.yaml"]
    assert completing_names.sources("runs/no") == []  # the shell completes the name
    steps = [name for name, _ in completing_names.checkpoints(made / "runs/first", "")]
    assert steps == ["best", "10", "5"]
    assert [name for name, _ in completing_names.checkpoints(None, "b")] == ["best"]
    assert tuple(pairing.POLICIES) == completing_names.POLICIES
    assert completing_names.FORMATS == export.FORMATS


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("alignflow sample runs/f", "runs/first"),
        ("alignflow export runs/first --to ", "diffusers comfyui kohya merged"),
        ("alignflow evaluate runs/first --checkpoint 1", "10"),
        ("alignflow pairs x --policy pass", "pass_fail"),
    ],
)
def test_the_shell_gets_names(line: str, found: str, made: Path) -> None:
    words = line.split(" ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_ALIGNFLOW_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(len(words) - 1)
    code = "import sys; sys.argv = ['alignflow']; from align.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == found.split()
