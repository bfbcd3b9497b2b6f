"""ETCHR's two stages: an editor imitates stored edits, then Edit-R1 goes on from its LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_run import SOURCE, final_tensors, settings

from align.config.load import load_config
from align.config.settings import Config
from align.data.inputs import pixels_of
from align.data.prompts import check_media, read_stored
from align.policy.lora import FILE
from align.search.export import write_as
from align.search.run import run_search
from align.search.settings import load_search
from align.training.trainer import train

ROOT = Path(__file__).parent.parent


def imitation(folder: Path, model: Path) -> Config:
    """Stage one on a tiny editor, whose edits are all red."""
    Image.new("RGB", (32, 32), (220, 30, 30)).save(folder / "red.png")
    rows = [{"prompt": f"make it red {n}", "image": str(SOURCE), "sample": "red.png"} for n in range(4)]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = settings(folder, model, "edit_r1").model_dump(mode="json")
    rollout = {"kind": "samples", "file": str(folder / "samples.jsonl"), "prompts": 4}
    return Config.model_validate(
        {
            **tree,
            "rollout": rollout,
            "recipe": {"kind": "flow_rwr", "timesteps": 2, "kl": 0},
            "out": str(folder / "one"),
        }
    )


def rows_of(config: Config, event: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


@pytest.mark.slow
def test_stage_two_goes_on_from_stage_one(model: Path, tmp_path: Path) -> None:
    first = imitation(tmp_path, model)
    train(first)
    init = {"kind": "lora", "init": str(first.run_dir / "lora")}
    second = settings(tmp_path, model, "edit_r1", policy=init, train={"steps": 2}, rollout={"filter": {"ban": True}})
    train(second)
    base, imitator = (rows_of(first, "eval")[n]["diversity"] for n in (0, -1))
    assert rows_of(second, "eval")[0]["diversity"] == pytest.approx(imitator, abs=1e-7)
    assert abs(base - imitator) > 1e-5
    tensors = final_tensors(second)
    start = load_file(first.run_dir / "lora" / FILE)
    kept = [value for name, value in tensors.items() if name.startswith("reference/")]
    assert sum(float(value.abs().sum()) for value in kept) == pytest.approx(
        sum(float(value.abs().sum()) for value in start.values()), rel=1e-5
    )  # the pull is to the imitator, not to the base
    assert any(
        not torch.equal(value, tensors[name.replace("policy/", "reference/")])
        for name, value in tensors.items()
        if name.startswith("policy/")
    )


def test_edits_of_the_embedded_world_are_stored_with_their_sources(tmp_path: Path) -> None:
    short = ["prompts.limit=2", "search.n=2", "search.sampler.steps=2", "samples.count=0", f"out={tmp_path / 'search'}"]
    config = load_search(ROOT / "configs/shapes-edit/search_imitate.yaml", short)
    run_search(config)
    assert write_as(config.run_dir, "finetune", tmp_path / "set") == 2
    rows = read_stored(str(tmp_path / "set/samples.jsonl"), ("sample",))
    check_media(rows, ("image",), "an editor")
    for row in rows:
        assert pixels_of(row, "image").shape == pixels_of(row, "sample").shape == (64, 64, 3)
        assert (pixels_of(row, "image") != pixels_of(row, "sample")).any()
    found = json.loads((config.run_dir / "candidates/0000/found.json").read_text())
    assert found["media"] == {"image": "image.png"}
    stage = load_config(ROOT / "configs/shapes-edit/etchr_imitate.yaml", [f"rollout.file={tmp_path}/set/samples.jsonl"])
    assert stage.recipe.kind == "flow_rwr"
