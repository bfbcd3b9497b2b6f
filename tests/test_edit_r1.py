"""Edit-R1 is DiffusionNFT on an editor without solved groups, and says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_seam import solved_cats
from tiny_run import final_tensors, redness, settings
from torch import Tensor

from align.config.load import load_config
from align.training.trainer import train
from alignflow.errors import ConfigError

ROOT = Path(__file__).parent.parent


def bright_sources(media: Tensor, prompts: list[str], image: Tensor) -> Tensor:
    """``redness`` less that of the source, which the prompts bring."""
    return redness(media, prompts) - redness(image, prompts)


@pytest.mark.slow
def test_it_is_nft_where_no_group_is_solved(model: Path, tmp_path: Path) -> None:
    found = []
    for name, kind in (("a", "edit_r1"), ("b", "nft")):
        (tmp_path / name).mkdir()
        recipe = {"kind": kind, "timesteps": 2}
        config = settings(tmp_path / name, model, "edit_r1", reward={"kind": "test_edit_r1:bright_sources"})
        tree = {**config.model_dump(mode="json"), "recipe": recipe}
        config = type(config).model_validate(tree)
        train(config)
        found.append(final_tensors(config))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_solved_groups_are_left_out_and_banned(model: Path, tmp_path: Path) -> None:
    assert solved_cats(torch.zeros(1, 3, 2, 2), ["a cat"]).item() == pytest.approx(0.95)
    config = settings(
        tmp_path, model, "edit_r1", reward={"kind": "test_seam:solved_cats"}, rollout={"prompts": 3, "filter": {}},
        train={"steps": 2}, prompts={"heldout": None},
    )  # fmt: skip
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["void_groups"] for row in rows) == 1  # six prompts, one of them a cat, in two rollouts
    assert rows[-1]["banned_prompts"] == 1
    assert all(row["loss"] is not None and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"generator": {"kind": "sd3", "path": "x"}},
            "edit_r1 trains an editor, and sd3 takes no source image; use nft",
        ),
        ({"rollout": {"filter": None}}, "is missing; write {} for Edit-R1's bounds, or use nft"),
        ({"rollout": {"kind": "pairs", "file": "x.jsonl"}}, "edit_r1 samples in training, to leave out solved groups"),
    ],
)
def test_it_needs_an_editor_and_the_filter(sections: Any, says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(tmp_path, model, "edit_r1", **sections)


def test_an_adapter_from_outside_may_be_an_editor(model: Path, tmp_path: Path) -> None:
    assert settings(tmp_path, model, "edit_r1", generator={"kind": "my.module:Editor", "path": "x"})
    assert settings(tmp_path, model, "edit_r1", generator={"kind": "generic", "path": "x"})


def test_the_place_of_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs/shapes-edit/edit_r1.yaml", ["rollout.filter=null"])
    assert [problem.path for problem in caught.value.problems] == ["rollout.filter"]
