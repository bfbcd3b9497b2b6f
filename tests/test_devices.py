"""A device is obeyed, or refused in the same words by every command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_run import settings

from align.cli.app import main
from align.runs import devices as named
from align.training.accelerating import accelerator_of
from align.training.trainer import train
from alignflow import devices
from alignflow.errors import ConfigError
from rewards import parse
from rewards.base import RewardError

CPU_BUILD = torch.version.cuda is None and torch.version.hip is None
without_cuda = pytest.mark.skipif(not CPU_BUILD, reason="this torch knows CUDA")
LACKS = "cuda is not available on this machine: torch is installed without CUDA; use cpu"


@pytest.mark.parametrize(
    "name", ["gpu", "cuda:", "cuda:-1", "cuda:1:2", "cuda: 1", "CUDA", "cpu:0", "", "meta", "cuda:\u0661"]
)
def test_nonsense_is_no_device(name: str, model: Path, tmp_path: Path) -> None:
    assert "there are auto, cpu, cuda, cuda:1, mps" in str(devices.malformed(name, auto=True))
    with pytest.raises(ValueError, match="no such device"):
        settings(tmp_path, model, generator={"device": name})
    with pytest.raises(ConfigError, match="no such device"):
        named.require(name)
    with pytest.raises(ValueError, match="no such device"):
        parse({"kind": "placed", "device": name, "reward": {"kind": "compressibility"}})


def test_auto_is_for_generators() -> None:
    assert devices.malformed("auto", auto=True) is None
    assert devices.malformed("auto") is not None


@without_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_every_command_refuses_a_card_that_is_not_there(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.config.load import dump_config

    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(settings(tmp_path, model, generator={"device": name})))
    said = LACKS.replace("cuda is", f"{name} is")
    for command in (
        ["check", str(config)],
        ["train", str(config)],
        ["sample", str(config)],
        ["evaluate", str(config)],
        ["reward", "serve", "compressibility", "--device", name],
    ):
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 2, command
        error = capsys.readouterr().err
        assert f"{'--device' if 'serve' in command else 'generator.device'}: {said}" in error.replace("\n", " "), (
            command
        )
    assert not (tmp_path / "run").exists()


@without_cuda
def test_search_and_placed_rewards_refuse_it_too(model: Path, tmp_path: Path) -> None:
    from align.search.run import run_search
    from align.search.settings import SearchConfig, check_files

    config = SearchConfig.model_validate({
        "name": "s", "out": str(tmp_path / "s"), "generator": {"path": str(model), "device": "cuda"},
        "prompts": {"source": "shapes:heldout", "limit": 1}, "reward": {"kind": "compressibility"},
        "search": {"kind": "best_of_n", "n": 2}, "budget": {"decodes": 2},
    })  # fmt: skip
    for refuses in (check_files, run_search):
        with pytest.raises(ConfigError, match=LACKS):
            refuses(config)
    with pytest.raises(RewardError, match=LACKS):
        parse({"kind": "placed", "device": "cuda", "reward": {"kind": "compressibility"}}).build()


def test_what_shows_only_when_it_runs_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_built_for_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert named.said("cuda:1") == "cuda:1 (whether this machine has it shows when it runs)"
    assert named.problems("device", "cuda:1") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides every card" in str(named.problems("device", "cuda:1")[0])
    monkeypatch.setattr(sys, "platform", "linux")
    assert "mps is Apple's" in str(devices.absent("mps"))
    assert named.said("auto") == "auto"


def test_a_card_by_its_number_is_the_one_of_the_accelerator(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.training.accelerating.require", lambda name: torch.device(name))
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: None)
    accelerator = accelerator_of(settings(tmp_path, model, generator={"device": "cuda:1"}))
    assert accelerator.device == torch.device("cuda:1")
    assert accelerator_of(settings(tmp_path, model)).device == torch.device("cpu")  # a second run, another device


def test_accelerate_may_not_choose_another(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.training.accelerating.require", lambda name: torch.device(name))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="cuda is set, but accelerate chose cpu"):
        accelerator_of(settings(tmp_path, model, generator={"device": "cuda"}))


def test_fp16_on_a_cpu_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fp16 needs a card"):
        settings(tmp_path, model, train={"precision": "fp16"})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="fp16 needs a card"):
        train(settings(tmp_path, model, train={"precision": "fp16"}, generator={"device": "auto"}))


def test_a_tracker_that_is_not_installed_is_refused_by_train_as_by_check(model: Path, tmp_path: Path) -> None:
    from align.checking.check import check_files

    config = settings(tmp_path, model, trackers=["swanlab"])
    for refuses in (check_files, train):
        with pytest.raises(ConfigError, match="trackers: swanlab is not installed: pip install 'swanlab'"):
            refuses(config)
    assert not config.run_dir.exists()
