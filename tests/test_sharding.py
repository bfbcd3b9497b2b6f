"""FSDP2: processes that each hold a part of the network learn what one process learns, and keep what it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from test_adapters import CASES
from tiny_run import EDITORS, LORA_ONLY, RECIPES, final_tensors, policy_gap, settings

from align.config import sharding
from align.runs import checkpoint
from align.training.trainer import train

RUN = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import Accelerator, PartialState
from align.policy.shards import is_shard, part
from align.training import keeping
from align.training.trainer import train
from tiny_run import settings

folder, model, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
Accelerator.end_training = lambda self: None  # which ends the process group: there is another run after this one
save = keeping.Keeping.save


def watched(kept, step):
    trainer = kept.state
    held = {key: value for key, value in trainer.roles.tensors().items()}
    for number, state in trainer.learners["policy"].stepper.optimizer.optimizer.state_dict()["state"].items():
        held |= {f"optimizer/{number}/{name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
    sizes = {}
    for key, value in held.items():
        mine, everyones = sizes.get(key.split("/")[0], (0, 0))
        sizes[key.split("/")[0]] = (mine + part(value).nbytes, everyones + value.numel() * value.element_size())
    shards = {key for key, value in held.items() if is_shard(value)}
    path = trainer.run.path / f"sizes-{trainer.share.rank}.json"
    path.write_text(json.dumps({"sizes": sizes, "shards": len(shards), "tensors": len(held)}))
    save(kept, step)


keeping.Keeping.save = watched
for name, (recipe, sharded, resume, sections) in cases.items():
    os.environ["ACCELERATE_USE_FSDP"] = "true" if sharded else "false"
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # as accelerate's launcher has it
    if PartialState().is_main_process:
        (folder / name).mkdir(exist_ok=True)
    PartialState().wait_for_everyone()
    train(settings(folder / name, model, recipe, **sections), resume=resume)
torch.distributed.destroy_process_group()
"""
POLICIES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"policy": {"kind": "full"}, "generator": {"dtype": "float32"}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed": {"train": {"gradient_checkpointing": True}},
    "bfloat16 base": {"generator": {"dtype": "bfloat16"}, "train": {"precision": "bf16"}},
    "guided": {"rollout": {"sampler": {"kind": "ode", "steps": 2, "guidance": 2.0}}},
    "ahead": {"rollout": {"overlap": "next"}},
}
ONE_UPDATE: dict[str, Any] = {
    "rollout": {"prompts": 3, "group": 2},  # the second process has fewer samples, and fewer chunks of them
    "train": {"steps": 1, "max_grad_norm": 1e6, "chunk": 3},
    "evaluate": {"every": 1, "prompts": 3, "chunk": 1},
    "reward": {"kind": "tiny_run:missing_by_content"},
}
TWO_STEPS: dict[str, Any] = {**ONE_UPDATE, "rollout": {"prompts": 2, "group": 2}, "checkpoint": {"every": 1, "keep": 3}}


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")


def moments(run: Path) -> dict[int, torch.Tensor]:
    """First moments of AdamW by number of the parameter; after one update, the gradient up to a factor."""
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    state = torch.load(path / "optimizer.pt", weights_only=True)["learners"]["policy"]["optimizer"]["state"]
    return {number: entry["exp_avg"] for number, entry in state.items()}


def assert_same_gradients(one: Path, two: Path, gap: float = 1e-4) -> None:
    a, b = moments(one), moments(two)
    largest = max(float(value.norm()) for value in a.values())
    assert largest > 1e-8
    for number, value in a.items():
        other = b.get(number, torch.zeros_like(value))  # a parameter without a gradient has no moment
        assert float((value - other).norm()) < gap * float(value.norm()) + 1e-7 * largest, number
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    rows = [next(row for row in run if row["event"] == "train") for run in lines]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=gap)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=10 * gap, abs=1e-6)


def assert_half_each(run: Path) -> None:
    """Each of two processes holds its part of every role and of the optimizer's states."""
    found = [json.loads((run / f"sizes-{rank}.json").read_text()) for rank in (0, 1)]
    assert "optimizer" in found[0]["sizes"]
    for one in found:
        assert one["shards"] == one["tensors"]
        for mine, everyones in one["sizes"].values():
            assert 0.4 < mine / everyones < 0.6
    for name, (_, everyones) in found[0]["sizes"].items():
        assert sum(one["sizes"][name][0] for one in found) == everyones


def alone(folder: Path, model: Path, recipe: str, sections: dict[str, Any], **how: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = settings(folder, model, recipe, **sections)
    train(config, **how)
    return config.run_dir


def one_update(recipe: str) -> dict[str, Any]:
    """An editor's samples of one prompt are so alike that one of each two is missing, which would teach nothing."""
    return {**ONE_UPDATE, "reward": {"kind": "tiny_run:redness"}} if recipe in EDITORS else ONE_UPDATE


def compared(recipes: list[str], policies: list[str], how: list[bool], folder: Path, model: Path) -> None:
    """One update on two processes, sharded or not, against one update on one."""
    names = [(recipe, policy) for recipe in recipes for policy in policies]
    cases = {
        f"{recipe}-{policy}-{sharded}": (recipe, sharded, False, {**one_update(recipe), **POLICIES[policy]})
        for recipe, policy in names
        for sharded in how
    }
    launch(2, folder, RUN, str(folder), str(model), json.dumps(cases), timeout=1500)
    for recipe, policy in names:
        one = alone(folder / f"{recipe}-{policy}", model, recipe, {**one_update(recipe), **POLICIES[policy]})
        for sharded in how:
            two = folder / f"{recipe}-{policy}-{sharded}" / "run"
            assert_same_gradients(one, two)
            if sharded:
                assert_half_each(two)


def test_two_processes_with_half_of_the_network_learn_as_one(model: Path, tmp_path: Path) -> None:
    compared(["nft"], ["lora"], [True], tmp_path, model)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_recipe_learns_on_two_processes_as_on_one(policy: str, model: Path, tmp_path: Path) -> None:
    recipes = [recipe for recipe in RECIPES if recipe != "texforce" and (policy == "lora" or recipe not in LORA_ONLY)]
    compared(recipes, [policy], [True, False], tmp_path, model)  # texforce holds no part of the network


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sharded_network_computes_as_a_whole_one_in_every_setting(model: Path, tmp_path: Path) -> None:
    found = {}
    for name, sections in VARIANTS.items():
        found[name] = {key: {**value, **sections.get(key, {})} for key, value in {**sections, **ONE_UPDATE}.items()}
    cases = {name: ("nft", True, False, sections) for name, sections in found.items()}
    launch(2, tmp_path, RUN, str(tmp_path), str(model), json.dumps(cases), timeout=1500)
    for name, sections in found.items():
        one = alone(tmp_path / f"{name} alone", model, "nft", sections)
        assert_same_gradients(one, tmp_path / name / "run", 0.05 if "bfloat16" in name else 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_four_processes_learn_as_one_however_the_network_is_held(model: Path, tmp_path: Path) -> None:
    """Three prompts: the fourth process has no samples. Two replicas of two shards each are HSDP."""
    replicas = {"parallel": {"replicas": 2}}
    cases = {
        f"{policy} {how}": ("nft", how != "whole", False, {**ONE_UPDATE, **POLICIES[policy], **more})
        for policy in POLICIES
        for how, more in (("whole", {}), ("shards", {}), ("replicas", replicas))
    }
    launch(4, tmp_path, RUN, str(tmp_path), str(model), json.dumps(cases), timeout=1500)
    for policy in POLICIES:
        one = alone(tmp_path / policy, model, "nft", {**ONE_UPDATE, **POLICIES[policy]})
        for how, held in (("whole", 1.0), ("shards", 0.25), ("replicas", 0.5)):
            two = tmp_path / f"{policy} {how}" / "run"
            assert_same_gradients(one, two)
            for rank in range(4):
                sizes = json.loads((two / f"sizes-{rank}.json").read_text())["sizes"]
                assert all(abs(mine / everyones - held) < 0.1 for mine, everyones in sizes.values())


EXPERTS = """
import sys
from pathlib import Path
import tiny_run
from align.training.trainer import train
from test_adapters import CASES
folder, model = Path(sys.argv[1]), Path(sys.argv[2])
case = next(case for case in CASES if case.kind == "wan")
options = {name: value for name, value in case.options.model_dump().items() if value}
train(tiny_run.settings(
    folder, model, generator={"kind": "wan", "path": str(model), "device": "cpu", **options},
    reward={"kind": "tiny_run:mean_pixel"}, prompts={"heldout": None},
    rollout={"prompts": 3, "group": 2}, train={"steps": 1, "max_grad_norm": 1e6, "chunk": 1},
))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_both_experts_are_called_equally_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one term a call, most calls reach one expert alone, and another one in each process."""
    next(case for case in CASES if case.kind == "wan").build().save_pretrained(tmp_path / "model")
    for count in (1, 2):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        (tmp_path / str(count)).mkdir()
        launch(count, tmp_path / str(count), EXPERTS, str(tmp_path / str(count)), str(tmp_path / "model"))
    assert_same_gradients(tmp_path / "1/run", tmp_path / "2/run", 1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpoint_of_two_shards_goes_on_in_one_process_and_in_three(
    policy: str, model: Path, tmp_path: Path
) -> None:
    """And that of one in two; with two prompts the third process has none."""

    def until(steps: int) -> dict[str, Any]:
        return {**TWO_STEPS, **POLICIES[policy], "train": {**ONE_UPDATE["train"], "steps": steps, "lr": 1e-3}}

    whole = alone(tmp_path / "whole", model, "nft", until(2))
    alone(tmp_path / "first", model, "nft", until(1))
    launch(2, tmp_path, RUN, str(tmp_path), str(model), json.dumps({"two": ("nft", True, False, until(1))}))
    for name, source in (("one", "two"), ("three", "two"), ("back", "first")):
        shutil.copytree(tmp_path / source, tmp_path / name)
    alone(tmp_path / "one", model, "nft", until(2), resume=True)
    for count, name in ((3, "three"), (2, "back")):
        case = json.dumps({name: ("nft", True, True, until(2))})
        launch(count, tmp_path, RUN, str(tmp_path), str(model), case)
    expected = final_tensors(settings(tmp_path / "whole", model, **until(2)))
    for name in ("one", "three", "back"):
        found = final_tensors(settings(tmp_path / name, model, **until(2)))
        for role in ("policy", "ema", "behaviour"):
            assert policy_gap(expected, found, role) < 2e-4
        exported = "lora/pytorch_lora_weights.safetensors" if policy == "lora" else "transformer/config.json"
        mine, theirs = ((folder / "run" / exported) for folder in (tmp_path / name, whole.parent))
        if policy == "full":
            assert mine.read_text() == theirs.read_text()
        else:
            assert mine.stat().st_size == theirs.stat().st_size


FAILS = """
import os, sys
from pathlib import Path
from align.rollout.sources import OnlineSource
from align.training.trainer import train
from alignflow.errors import DataError
from tiny_run import settings
asked = OnlineSource._asked


def fails(source, step):
    if step == 1 and os.environ["RANK"] == "1":
        raise DataError("line 2 is unreadable")
    return asked(source, step)


OnlineSource._asked = fails
try:
    train(settings(Path(sys.argv[1]), Path(sys.argv[2]), checkpoint={"every": 2}))
except Exception as error:
    (Path(sys.argv[1]) / os.environ["RANK"]).write_text(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_error_of_one_process_ends_all_and_names_the_last_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    said = launch(2, tmp_path, FAILS, str(tmp_path), str(model))
    assert (tmp_path / "1").read_text() == "DataError: line 2 is unreadable"
    assert "another process stopped" in (tmp_path / "0").read_text()
    assert "so no checkpoint of step 1 is written; there is no earlier checkpoint" in said
    assert checkpoint.latest(tmp_path / "run/checkpoints") is None


@pytest.mark.parametrize(
    ("variable", "value", "section", "words"),
    [
        ("FSDP_VERSION", "1", {}, "--fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", {}, "--fsdp_offload_params false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", {}, r"train.gradient_checkpointing"),
        ("FSDP_VERSION", "2", {"train": {"optimizer": "adamw8bit"}}, "use adamw"),
        ("FSDP_VERSION", "2", {"memory": {"compile": "blocks"}}, "not compiled"),
        ("FSDP_VERSION", "2", {"memory": {"quantise": "fp8"}}, "cannot be sharded"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_a_remedy(
    variable: str, value: str, section: Any, words: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, model, **section)
    monkeypatch.setenv(variable, value)
    assert sharding.problems(config) == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (problem,) = sharding.problems(config)
    assert words in problem.message
