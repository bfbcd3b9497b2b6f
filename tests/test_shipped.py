"""The shipped configs of real models: their held-out gold, and files that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.checking.named import parts_of
from align.config.load import load_config, read_layers
from rewards.base import RewardSettings

ROOT = Path(__file__).parent.parent
REAL = sorted(
    path
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name not in ("rewards", "rewriting", "shared") and not path.parent.name.startswith("shapes")
)
EDITORS = ("flux-kontext", "qwen-image-edit")
"""Folders whose prompts are instructions, with which no reward here compares a result alone."""


def kinds(reward: object) -> set[str]:
    """Of a reward and of those inside it."""
    return {
        str(part.kind) for _, part in parts_of(reward) if isinstance(part, RewardSettings) and hasattr(part, "kind")
    }


TRAINING = [path for path in REAL if not path.name.startswith("search") and path.name != "base.yaml"]


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_gold_is_a_reward_that_is_not_trained(path):
    config = load_config([path])
    if path.parent.name in EDITORS:
        assert config.evaluate.gold is None
        return
    assert config.evaluate.gold is not None
    assert not kinds(config.evaluate.rewards[config.evaluate.gold]) & kinds(config.reward)


def test_prompts_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in REAL:
        merged = [layer.data.get("prompts") or {} for layer in read_layers(path)]
        files = [
            Path(str(prompts[key]))
            for prompts in merged
            for key in ("train", "heldout", "source")
            if key in prompts and str(prompts[key]).endswith((".txt", ".jsonl"))
        ]
        own = {"references.jsonl", "newton.jsonl"}
        assert all(file.is_file() for file in files if file.name not in own), files


def test_a_path_through_a_linked_folder_stays_as_it_is_written(tmp_path, monkeypatch):
    real = tmp_path / "real/deep"
    real.mkdir(parents=True)
    (tmp_path / "real/prompts.txt").write_text("from real\n")
    (tmp_path / "linked").symlink_to(real)
    (real / "run.yaml").write_text("prompts: {train: ../prompts.txt}\n")
    monkeypatch.chdir(Path(__file__).parent)
    (layer,) = read_layers(tmp_path / "linked/run.yaml")
    assert Path(layer.data["prompts"]["train"]).read_text() == "from real\n"
