"""Work that does not divide: any number of prompts, shown samples and groups on any number of real processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from test_adapters import CASES
from tiny_run import RECIPES, final_tensors, settings, some_slow

from align.config.settings import Config
from align.runs.checkpoint import latest
from align.runs.per_prompt import read_scores, scored_steps
from align.runs.processes import Share
from align.training.trainer import train

RUN = """
import json, sys
from pathlib import Path
from align.training.trainer import train
from tiny_run import settings
folder, model, recipe, sections = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
train(settings(folder, model, recipe, **sections))
"""
SECTIONS: dict[str, Any] = {
    "rollout": {"prompts": 5, "group": 2},
    "train": {"steps": 2, "updates": 2, "chunk": 3},
    "evaluate": {"every": 2, "prompts": 5, "chunk": 2},
    "samples": {"every": 1, "count": 4},
    "reward": {"kind": "tiny_run:missing_by_content"},
    "memory": {"cache_prompts": "memory"},
}


def sections_of(recipe: str) -> dict[str, Any]:
    """Trained text encoders cannot be dropped."""
    return {name: value for name, value in SECTIONS.items() if recipe != "texforce" or name != "memory"}


def run(count: int, tmp_path: Path, model: Path, recipe: str, sections: dict[str, Any]) -> Config:
    folder = tmp_path / str(count)
    folder.mkdir()
    launch(count, folder, RUN, str(folder), str(model), recipe, json.dumps(sections))
    return settings(folder, model, recipe, **sections)


def rows(config: Config) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without times, what a process measures on its own part, and counts of rounding."""
    found = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    own = ("seconds", "time", "images_per_second", "kl_velocity", "contrast", "ratio", "clipped", "network_calls")
    return [{key: value for key, value in row.items() if key not in own} for row in found]


def alike(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(alike(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(alike, one, two))
    return one == (pytest.approx(two, rel=1e-3, abs=1e-5) if isinstance(one, float) else two)


def assert_same(one: Config, two: Config) -> None:
    for a, b in zip(rows(one), rows(two), strict=True):
        assert alike(a, b), (a, b)
    assert scored_steps(one.run_dir) == scored_steps(two.run_dir) != []
    for step in scored_steps(one.run_dir):
        for a, b in zip(read_scores(one.run_dir, step), read_scores(two.run_dir, step), strict=True):
            assert (a.prompt, a.seed, a.reasons.keys()) == (b.prompt, b.seed, b.reasons.keys())
            assert alike(a.scores, b.scores)
    shown = sorted(path.relative_to(one.run_dir) for path in one.run_dir.glob("samples/*/*.png"))
    assert shown == sorted(path.relative_to(two.run_dir) for path in two.run_dir.glob("samples/*/*.png"))
    made = [path for path in shown if not path.stem.endswith("source")]
    assert len(made) == 3 * (4 + 1)  # at steps 0, 1 and 2, and the grid
    first = Path("samples/step-000000")  # before an update, so equal to the bit but for the batch's rounding
    here, there = (json.loads((config.run_dir / first / "prompts.json").read_text()) for config in (one, two))
    assert alike(here, there)
    weights, others = final_tensors(one), final_tensors(two)
    gap = max(float((weights[name] - others[name]).abs().max()) for name in weights)
    assert gap < 2e-3, gap  # of a learning rate of 1e-2: AdamW's signs turn where a gradient is near 0


@pytest.fixture
def alone(model: Path, tmp_path: Path) -> Callable[[str], Config]:
    """The same run on one process, this one."""

    def trained(recipe: str) -> Config:
        (tmp_path / "1").mkdir()
        config = settings(tmp_path / "1", model, recipe, **sections_of(recipe))
        train(config)
        return config

    return trained


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "count"), [("nft", 2), ("nft", 3)])
def test_two_processes_or_three_do_uneven_work_as_one(
    recipe: str, count: int, alone: Any, model: Path, tmp_path: Path
) -> None:
    assert_same(alone(recipe), run(count, tmp_path, model, recipe, SECTIONS))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", some_slow(RECIPES))
def test_eight_processes_do_the_work_of_one(recipe: str, alone: Any, model: Path, tmp_path: Path) -> None:
    """Five prompts: three processes have none."""
    assert_same(alone(recipe), run(8, tmp_path, model, recipe, sections_of(recipe)))


@pytest.mark.slow
def test_all_processes_end_early_at_the_step_of_one(model: Path, tmp_path: Path) -> None:
    """One prompt: the second process evaluates nothing, and ends with the first."""
    sections: dict[str, Any] = {
        "train": {"steps": 6, "lr": 0.0},
        "evaluate": {"every": 1, "prompts": 1, "patience": 2},
        "checkpoint": {"every": 6, "best": "reward"},
    }
    alone, two = run(1, tmp_path, model, "nft", sections), run(2, tmp_path, model, "nft", sections)
    ends = [latest(config.run_dir / "checkpoints") for config in (alone, two)]
    assert [end.name for end in ends if end] == ["step-000003"] * 2
    assert rows(alone)[-1]["step"] == rows(two)[-1]["step"] == 3


ADAPTER = """
import sys
from pathlib import Path
import tiny_run
from align.training.trainer import train
from test_adapters import CASES
folder, model, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
case = next(case for case in CASES if case.kind == kind)
options = {name: value for name, value in case.options.model_dump().items() if value}
tree = {"kind": kind, "path": str(model), "device": "cpu", **options}
train(tiny_run.settings(
    folder, model, generator=tree, reward={"kind": "tiny_run:mean_pixel"}, prompts={"heldout": None},
    rollout={"prompts": 3, "group": 2}, train={"steps": 2, "max_grad_norm": 1e6},
))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen_image", "hunyuan_video15", "mochi", "wan"])
def test_adapters_with_idle_layers_and_experts_train_on_several(kind: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.kind == kind)
    case.build().save_pretrained(tmp_path / "model")
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        launch(count, folder, ADAPTER, str(folder), str(tmp_path / "model"), kind)
        checkpoint = latest(folder / "run/checkpoints")
        assert checkpoint is not None
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["learners"]["policy"]["optimizer"]["state"]
        found.append([entry["exp_avg"] for entry in state.values()])
    one, two = found
    assert len(one) == len(two) > 0
    assert all(float(moment.abs().max()) > 0 for moment in one)
    assert max(float((a - b).norm() / a.norm()) for a, b in zip(one, two, strict=True)) < 0.02


def test_shares_cover_everything_once_and_the_first_process_has_some() -> None:
    for world in (1, 2, 3, 8, 24):
        for count in (0, 1, 2, 5, 8, 23, 24):
            shares = [Share(rank, world).of(count) for rank in range(world)]
            assert [item for share in shares for item in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert len(shares[0]) == max(map(len, shares))
            for item in range(count):
                assert item in shares[Share(0, world).owner(item, count)]
