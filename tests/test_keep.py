"""Training on a part of every group: the samples whose rewards have the largest variance."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from test_processes import SECTIONS, assert_same, run
from tiny_run import final_tensors, settings

from align.checking.check import geometry
from align.checking.sizes import terms_per_update
from align.maths.filters import most_spread
from align.training.trainer import train


def test_both_ends_are_kept_and_missing_scores_never() -> None:
    nan = float("nan")
    rewards = torch.tensor([0.0, 0.1, 0.9, 1.0, 0.5, 0.5, 0.2, 0.2, 0.2, 0.9, nan, 0.3])
    group = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    assert most_spread(rewards, group, 2).nonzero().flatten().tolist() == [0, 3, 8, 9, 11]
    # one more of the low end: {0, 0.1, 1} has variance 0.202, {0, 0.9, 1} the same, and the even split comes first
    assert most_spread(rewards, group, 4).nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 11]


def test_no_subset_has_a_larger_variance() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        rewards = torch.rand(7, generator=draw, dtype=torch.float64) ** 3
        kept = most_spread(rewards, torch.zeros(7, dtype=torch.long), 3)
        best = max(float(rewards[list(some)].var(correction=0)) for some in combinations(range(7), 3))
        assert kept.sum() == 3
        assert float(rewards[kept].var(correction=0)) == pytest.approx(best, abs=1e-15)


def test_all_kept_is_the_run_without_it_and_a_part_is_another(model: Path, tmp_path: Path) -> None:
    found = []
    for name, keep in (("none", None), ("all", 4), ("half", 2)):
        (tmp_path / name).mkdir()
        config = settings(tmp_path / name, model, rollout={"prompts": 2, "group": 4, "keep": keep}, train={"steps": 2})
        train(config)
        found.append(final_tensors(config))
    none, everyone, half = found
    assert all(torch.equal(value, everyone[name]) for name, value in none.items())
    assert any(not torch.equal(value, half[name]) for name, value in none.items())


def test_check_counts_the_terms_that_are_left(model: Path, tmp_path: Path) -> None:
    whole = settings(tmp_path, model, rollout={"prompts": 2, "group": 4})
    half = settings(tmp_path, model, rollout={"prompts": 2, "group": 4, "keep": 2})
    assert 2 * terms_per_update(half, 1)["policy"] == terms_per_update(whole, 1)["policy"]
    assert "= 8 samples, of which 4 are trained on, per rollout; 2 x each = 8 terms;" in geometry(half)
    assert "= 8 samples per rollout; 2 x each = 16 terms;" in geometry(whole)


@pytest.mark.parametrize(
    ("recipe", "keep", "says"),
    [("dgpo", 2, "dgpo does not train samples separately"), ("nft", 5, "larger than the group of 4")],
)
def test_it_needs_terms_of_single_samples_and_a_group(
    recipe: str, keep: int, says: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(tmp_path, model, recipe, rollout={"prompts": 2, "group": 4, "keep": keep})


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lora", "full"])
def test_two_processes_keep_the_samples_of_one(policy: str, model: Path, tmp_path: Path) -> None:
    sections = {**SECTIONS, "rollout": {"prompts": 3, "group": 4, "keep": 2}}
    if policy == "full":
        sections |= {"policy": {"kind": "full"}, "train": {**SECTIONS["train"], "lr": 1e-4}}
    (tmp_path / "1").mkdir()
    alone = settings(tmp_path / "1", model, "nft", **sections)
    train(alone)
    assert_same(alone, run(2, tmp_path, model, "nft", sections))
