"""Pairs that count by the gap of their scores: GAPO's weights, MM-DPO's betas, stored scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_training import stored_pairs_config
from tiny_run import settings

from align.maths.losses import pair_pref
from align.maths.weights import beta_of_gap, gap_power
from align.recipes.flow_dpo import FlowDPO
from align.recipes.gapo import GAPO
from align.recipes.mm_dpo import MMDPO
from align.training.trainer import train
from alignflow.errors import DataError, TrainingError


def weight(won: float, lost: float, alpha: float = 2.0) -> float:
    return float(gap_power(torch.tensor([won]), torch.tensor([lost]), alpha, 100.0))


def test_weights_are_the_papers():
    assert weight(100, 0) == 1
    assert weight(90, 60) == pytest.approx(0.350349, abs=1e-6)
    assert weight(50, 50) == 0
    assert weight(90, 70) > weight(50, 30)
    assert weight(90, 60, alpha=1 + 1e-6) == pytest.approx(0, abs=1e-6)


def test_the_loss_at_the_reference_is_log_2_times_the_weight():
    zero = torch.zeros(2)
    options = GAPO(scale=100).preference(torch.tensor([[100.0, 0.0], [90.0, 60.0]]))
    loss = pair_pref(zero, zero, zero, zero, **options).value
    torch.testing.assert_close(loss, torch.tensor([math.log(2), 0.242844]), atol=1e-6, rtol=0)


def test_scores_above_the_scale_are_refused(model: Path, tmp_path: Path) -> None:
    config = stored_pairs_config(tmp_path / "run", model, table(tmp_path, *[(90, 60)] * 4), {"kind": "gapo"})
    with pytest.raises(TrainingError, match=r"gapo: a score is 90; raise recipe.scale, now 1"):
        train(config)


def test_beta_grows_with_the_gap():
    beta = beta_of_gap(torch.tensor([0.0, 2.0, 1e6]), 0.1, 0.5, 0.5)
    torch.testing.assert_close(beta, torch.tensor([0.1, 0.131606, 0.15]), atol=1e-6, rtol=0)
    scores = torch.tensor([[0.5, 0.1], [0.9, 0.1]])
    small, large = MMDPO(beta=100).preference(scores)["beta"].tolist()
    assert 100 < small < large < 150
    assert MMDPO(beta=100, extra=0.0).preference(scores)["beta"].tolist() == [100, 100]
    assert FlowDPO(beta=100).preference(scores) == {"beta": 100}


@pytest.mark.parametrize("recipe", ["flow_dpo", "gapo", "mm_dpo"])
def test_a_pair_with_a_missing_score_costs_nothing(recipe: str, model: Path, tmp_path: Path) -> None:
    reward, rollout = {"kind": "tiny_run:missing_by_content"}, {"prompts": 3, "group": 2}
    config = settings(tmp_path, model, recipe, reward=reward, rollout=rollout, train={"steps": 1})
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["event"] == "train"]
    assert row["missing"] == 1
    assert math.isfinite(row["loss"])
    assert row["grad_norm"] > 0


# -- tables -----------------------------------------------------------------------------------------------------------


def table(folder: Path, *scores: tuple[Any, Any] | None, same: bool = False) -> Path:
    """Pairs of a red and a blue image, each with these scores."""
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    lines = []
    for pair in scores:
        row = {"prompt": "a cat", "chosen": "red.png", "rejected": "red.png" if same else "blue.png"}
        lines.append(row if pair is None else {**row, "chosen_score": pair[0], "rejected_score": pair[1]})
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.mark.parametrize(("scores", "expected"), [((90, 60), 0.242844), (None, math.log(2))])
def test_stored_scores_weigh_the_loss(scores: Any, expected: float, model: Path, tmp_path: Path) -> None:
    recipe = {"kind": "gapo", "timesteps": 2, "scale": 100 if scores else 1}
    config = stored_pairs_config(tmp_path / "run", model, table(tmp_path, *[scores] * 4), recipe)
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert next(row["loss"] for row in rows if row["event"] == "train") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (("10", "9"), "line 2: a pair with scores has a number under \"chosen_score\", given '10'"),
        ((0.5, None), 'line 2: a pair with scores has a number under "rejected_score", given None'),
        ((math.nan, 0.1), 'line 2: a pair with scores has a number under "chosen_score", given nan'),
        ((True, 0.1), 'line 2: a pair with scores has a number under "chosen_score", given True'),
        ((0.1, 0.2), "line 2: chosen_score 0.1 should be higher than rejected_score 0.2"),
        ((0.2, 0.2), "line 2: chosen_score 0.2 should be higher than rejected_score 0.2"),
    ],
)
def test_scores_that_say_nothing_are_named(pair: Any, says: str, model: Path, tmp_path: Path) -> None:
    file = table(tmp_path, (0.9, 0.1), pair)
    with pytest.raises(DataError) as caught:
        train(stored_pairs_config(tmp_path / "run", model, file, {"kind": "gapo"}))
    assert says in str(caught.value)


def test_a_pair_of_one_file_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: chosen and rejected are the same file"):
        train(stored_pairs_config(tmp_path / "run", model, table(tmp_path, None, same=True), {"kind": "flow_dpo"}))
