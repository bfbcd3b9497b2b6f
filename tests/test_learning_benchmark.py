"""``python -m benchmarks.learning --out``: run folders that are kept, continued and compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from align.comparison import compare
from benchmarks import learning

NFT = Path(__file__).parent.parent / "configs" / "shapes" / "nft.yaml"
SMALL = ["train.steps=1", "rollout.prompts=1", "rollout.group=2", "evaluate.prompts=3", "evaluate.rewards.clip=null"]


def benchmark(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["learning", str(NFT), *words])
    learning.main()


def test_a_run_is_named_by_config_overrides_and_seed() -> None:
    assert learning.run_name(NFT, 2, ["train.lr=1e-3", "policy.rank=4"]) == "shapes-nft-lr-1e-3-rank-4-seed-2"
    assert learning.run_name(NFT, 0, []) == "shapes-nft-seed-0"


def test_kept_runs_are_continued_and_compared_by_setting(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "kept"
    for lr in ("0", "1e-3"):
        benchmark(monkeypatch, *SMALL, f"train.lr={lr}", "--seeds", "0", "1", "--out", str(out))
    names = sorted(folder.name for folder in out.iterdir())
    assert len(names) == 4
    assert [name.rpartition("-lr-")[2] for name in names] == ["0-seed-0", "0-seed-1", "1e-3-seed-0", "1e-3-seed-1"]
    found = compare(sorted(out.iterdir()))
    assert [arm.seeds for arm in found.arms] == [[0, 1], [0, 1]]
    (one,) = found.scores[0].differences
    assert (one.pairing, one.prompts.pairs, one.paired_seeds) == ("noise", 6, True)  # three prompts of each seed
    capsys.readouterr()
    rows = (out / names[0] / "metrics.jsonl").read_text()
    benchmark(monkeypatch, *SMALL, "train.lr=0", "--seeds", "0", "--out", str(out), "--json", str(tmp_path / "j"))
    assert (out / names[0] / "metrics.jsonl").read_text() == rows  # nothing was trained again
    assert json.loads((tmp_path / "j").read_text())[str(NFT)][0]["steps"] == 1


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    benchmark(monkeypatch, *SMALL, "--seeds", "0")
    assert not list(tmp_path.iterdir())
