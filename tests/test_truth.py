"""Log-probabilities of the rollout and of the update: measured, warned about, recomputed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from pydantic import ValidationError
from tiny_run import final_tensors, policy_gap, settings

from align.training import truth
from align.training.trainer import train
from generators.base import Generator


def first_row(config: Any) -> dict[str, Any]:
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["event"] == "train"]
    assert not any("logp_gap/max" in row for row in trained[1:])
    return trained[0]


def test_differences_in_closed_form() -> None:
    ratios = torch.tensor([1.0, math.exp(1e-3), math.exp(-3e-3), 1.0], dtype=torch.double)
    found = truth.gaps(ratios)
    assert found["logp_gap/mean"] == pytest.approx(1e-3)
    assert found["logp_gap/max"] == pytest.approx(3e-3)
    assert found["logp_gap/p99"] == pytest.approx(1e-3 + 0.97 * 2e-3)


def noisy(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Without gradient the network computes something slightly different, as another kernel would."""
    plain = Generator.velocity

    def velocity(self: Generator, x: Any, t: Any, cond: Any, guidance: float = 1.0) -> torch.Tensor:
        found = plain(self, x, t, cond, guidance)
        return found if torch.is_grad_enabled() else found + error * torch.sin(1e4 * found)

    monkeypatch.setattr(Generator, "velocity", velocity)


@pytest.mark.parametrize("recipe", ["grpo", {"kind": "grpo", "ratio": "guard"}, {"kind": "grpo", "ratio": "dppo"}])
def test_equal_arithmetic_has_no_gap(recipe: Any, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, recipe, train={"steps": 2}, evaluate={"every": 0})
    train(config)
    assert first_row(config)["logp_gap/max"] < 2e-6


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_a_gap_is_measured_warned_about_and_recomputed(
    ratio: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy(monkeypatch, 0.01)
    rows, said = {}, {}
    for recompute in (False, True):
        (tmp_path / str(recompute)).mkdir()
        config = settings(
            tmp_path / str(recompute), model, {"kind": "grpo", "ratio": ratio, "ratio_clip": 1e-5},
            train={"steps": 2, "updates": 2, "chunk": 3}, evaluate={"every": 0}, rollout={"recompute": recompute},
        )  # fmt: skip
        train(config)
        rows[recompute], said[recompute] = first_row(config), capsys.readouterr().out
    assert rows[False]["logp_gap/p99"] > 1e-5
    assert rows[False]["logp_gap/mean"] <= rows[False]["logp_gap/p99"] <= rows[False]["logp_gap/max"]
    assert "reaches recipe.ratio_clip 1e-05 (rollout.chunk 8 beside train.chunk 3)" in said[False]
    assert rows[True]["logp_gap/max"] == 0
    assert "log-probabilities" not in said[True]


def test_recomputing_changes_nothing_where_nothing_differs(model: Path, tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        (tmp_path / str(recompute)).mkdir()
        config = settings(
            tmp_path / str(recompute), model, "grpo", train={"steps": 1}, rollout={"recompute": recompute}
        )
        train(config)
        found.append(final_tensors(config))
    assert policy_gap(*found) < 1e-4


def test_causes_are_those_of_the_config(model: Path, tmp_path: Path) -> None:
    config = settings(
        tmp_path, model, "grpo", train={"precision": "bf16", "chunk": 64},
        rollout={"sampler": {"kind": "flow_sde", "steps": 3, "guidance": 4.5}},
    )  # fmt: skip
    said = truth.warning(config, {"logp_gap/p99": 7e-5})
    assert said is not None
    assert "by 7e-05 or more, which is more than half of recipe.ratio_clip 0.0001 (train.precision bf16, " in said
    assert "guidance 4.5); rollout.recompute=true" in said
    assert truth.warning(config, {"logp_gap/p99": 4e-5}) is None
    assert truth.warning(config, {}) is None


@pytest.mark.parametrize(
    ("recipe", "rollout", "says"),
    [
        ("nft", {"recompute": True}, "nft has no ratio of log-probabilities of steps"),
        ("prdp", {"recompute": True}, "prdp has no ratio of log-probabilities of steps"),
        ("grpo", {"recompute": True, "overlap": "next"}, "the policy has changed since the next rollout was sampled"),
    ],
)
def test_what_cannot_be_recomputed(recipe: str, rollout: Any, says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(tmp_path, model, recipe, rollout=rollout)


RUN = """
import sys
from pathlib import Path
from align.training.trainer import train
from tiny_run import settings
folder, model = Path(sys.argv[1]), Path(sys.argv[2])
train(settings(folder, model, "grpo", train={"steps": 2}, rollout={"prompts": 3, "recompute": True}))
"""


@pytest.mark.slow
def test_two_processes_recompute_as_one(model: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        launch(count, folder, RUN, str(folder), str(model))
        config = settings(folder, model, "grpo", train={"steps": 2}, rollout={"prompts": 3})
        assert first_row(config)["logp_gap/max"] == 0
        found.append(final_tensors(config))
    assert policy_gap(*found) < 2e-3
