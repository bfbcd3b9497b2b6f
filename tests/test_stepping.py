"""The optimizer step: what fp16 leaves out is counted apart, its loss scale is kept, small updates are not lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_run import final_tensors, policy_gap, settings

from align.checking.check import check_files
from align.config.settings import Config
from align.runs import checkpoint
from align.runs.processes import Processes
from align.training import accelerating
from align.training.trainer import train
from alignflow.errors import ConfigError, TrainingError


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The loss scale of fp16 in a run whose networks compute in float32: a CPU has no fp16 to train in."""

    def start(largest: float = 65504, **options: Any) -> None:
        def as_fp16(processes: Processes, parameters: list[torch.nn.Parameter]) -> None:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(parameter.grad.abs() > largest, torch.inf)

        monkeypatch.setattr(Processes, "add_gradients", as_fp16)

        class Scaled(Accelerator):
            def __init__(self, **told: Any) -> None:
                super().__init__(**told)
                self.scaler = torch.amp.GradScaler("cpu", **options)
                self.native_amp = True  # so that accelerate unscales before it clips

        monkeypatch.setattr(accelerating, "Accelerator", Scaled)

    return start


def rows(config: Config) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["event"] == "train"]


def small(folder: Path, model: Path, **train: Any) -> Config:
    folder.mkdir(exist_ok=True)
    options = {"steps": 6, **train}
    return settings(folder, model, prompts={"heldout": None}, train=options, rollout={"prompts": 2, "group": 2})


def test_overflow_lowers_the_scale_and_the_run_goes_on(scaled: Any, model: Path, tmp_path: Path) -> None:
    scaled(init_scale=2.0**30)  # more updates overflow than may fail for another reason
    config = small(tmp_path, model, steps=20)
    assert train(config)["status"] == "finished"
    found = rows(config)
    overflowed = [row["grad_norm"] is None for row in found]
    assert overflowed[:4] == [True] * 4, found
    assert not overflowed[-1]
    assert found[-1]["overflows"] == sum(overflowed)
    assert found[-1]["loss_scale"] == 2.0 ** (30 - sum(overflowed))
    state = torch.load(checkpoint.latest(config.run_dir / "checkpoints") / "optimizer.pt", weights_only=True)
    state = state["learners"]["policy"]
    assert state["scaler"]["scale"] == found[-1]["loss_scale"]
    steps = {int(entry["step"]) for entry in state["optimizer"]["state"].values()}
    assert steps == {20 - sum(overflowed)}  # the optimizer took part in the others alone


def test_a_run_without_a_finite_gradient_at_any_scale_ends(scaled: Any, model: Path, tmp_path: Path) -> None:
    scaled(largest=-1, init_scale=4.0)
    with pytest.raises(TrainingError, match=r"not finite at any loss scale down to 1 \(optimizer step 3\)"):
        train(small(tmp_path, model))


def test_the_scale_survives_a_resume(scaled: Any, model: Path, tmp_path: Path) -> None:
    scaled(init_scale=2.0**12, growth_interval=2)
    whole = small(tmp_path / "whole", model)
    train(whole)
    assert rows(whole)[-1]["loss_scale"] == 2.0**15
    first, second = (small(tmp_path / "parts", model, steps=steps) for steps in (3, 6))
    train(first)
    train(second, resume=True)
    assert [row["loss_scale"] for row in rows(second)] == [row["loss_scale"] for row in rows(whole)]
    assert policy_gap(final_tensors(whole), final_tensors(second)) == 0


def moved(config: Config) -> float:
    """Share of the trained weights that are not the base's any more."""
    weights = final_tensors(config)
    names = [name.partition("/")[2] for name in weights if name.startswith("policy/")]
    changed = sum(int((weights[f"policy/{name}"] != weights[f"reference/{name}"]).sum()) for name in names)
    return changed / sum(weights[f"reference/{name}"].numel() for name in names)


def test_small_updates_of_all_weights_are_not_lost(model: Path, tmp_path: Path) -> None:
    shares = {}
    for precision in ("no", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        config = settings(
            folder, model, policy={"kind": "full"}, prompts={"heldout": None},
            train={"lr": 1e-6, "steps": 3, "precision": precision},
        )  # fmt: skip
        train(config)
        shares[precision] = moved(config)
    assert shares["no"] > 0.8
    assert shares["bf16"] == pytest.approx(shares["no"], abs=0.05)


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_half_precision_weights_are_not_trained(dtype: str, precision: str, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, policy={"kind": "full"}, generator={"dtype": dtype})
    for refuses in (check_files, train):
        with pytest.raises(ConfigError, match=f"generator.dtype: .* use float32, and train.precision {precision}"):
            refuses(config)
    check_files(settings(tmp_path, model, generator={"dtype": dtype}))  # of a LoRA the weights are float32
