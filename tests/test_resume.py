"""What was stopped goes on to the same bits; what is on disk is never lost, nor taken for something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import RECIPES, ZERO_AT_FIRST, final_tensors, policy_gap, settings, some_slow

from align.runs import checkpoint
from align.training.trainer import train
from alignflow.errors import CheckpointError, RunFolderError

ROOT = Path(__file__).parent.parent


def train_rows(metrics: Path) -> int:
    """Whole training rows written so far."""
    return metrics.read_text().count('"event": "train"') if metrics.is_file() else 0


def test_a_run_from_before_a_setting_existed_goes_on(model: Path, tmp_path: Path) -> None:
    """A line the run's config lacks means the default; another value is another run."""
    config = settings(tmp_path, model, train={"steps": 1})
    train(config)
    path = config.run_dir / "config.yaml"
    text = path.read_text()
    assert "same_noise: false" in text
    path.write_text(text.replace("same_noise: false, ", "").replace("  same_noise: false\n", ""))
    assert "same_noise" not in path.read_text()
    assert train(settings(tmp_path, model, train={"steps": 2}), resume=True)["steps"] == 2
    sampler = {"kind": "flow_sde", "steps": 3}
    other = settings(tmp_path, model, train={"steps": 2}, rollout={"same_noise": True, "sampler": sampler})
    with pytest.raises(RunFolderError, match=r"same_noise: False then, True now"):
        train(other, resume=True)


def test_a_run_with_old_names_of_settings_is_resumed_once_they_are_renamed(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, train={"steps": 1})
    train(config)
    path = config.run_dir / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("timesteps:", "times:").replace("  chunk: 192", "  micro_batch: 192"))
    more = settings(tmp_path, model, train={"steps": 2})
    with pytest.raises(RunFolderError, match="is not valid in this version; correct it, then --resume:") as old:
        train(more, resume=True)
    assert "recipe.times (" in str(old.value)
    assert "): is now recipe.timesteps\n" in str(old.value)
    assert str(old.value).endswith("): is now train.chunk")
    path.write_text(text)
    assert train(more, resume=True)["steps"] == 2


FIXED = {"kind": "tiny_run:redness"}
LEARNING = {
    "kind": "mixture",
    "parts": {
        "fixed": {"reward": FIXED},
        "likeness": {"reward": {"kind": "adversarial", "model": "shapes", "references": "shapes", "lr": 1e-2}},
    },
}


@pytest.mark.parametrize("recipe", some_slow(RECIPES))
def test_every_recipe_resumes_to_the_same_bits(recipe: str, model: Path, tmp_path: Path) -> None:
    def run(name: str, *steps: int) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir()
        for number, count in enumerate(steps):
            config = settings(tmp_path / name, model, recipe, train={"steps": count, "schedule": "constant"})
            train(config, resume=number > 0)
        path = checkpoint.latest(config.run_dir / "checkpoints")
        assert path is not None
        return load_file(path / "roles.safetensors")

    whole, parts = run("whole", 3), run("parts", 1, 3)
    assert whole.keys() == parts.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, parts[name])] == []
    moved = [
        value for name, value in whole.items() if "policy/" in name and any(part in name for part in ZERO_AT_FIRST)
    ]
    assert any(value.any() for value in moved)


@pytest.mark.parametrize("reward", [FIXED, LEARNING], ids=["fixed reward", "reward that learns"])
def test_resumed_run_ends_with_the_same_bits(reward: dict[str, Any], model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = settings(tmp_path / "a", model, train={"steps": 4}, reward=reward)
    train(whole)
    first = settings(tmp_path / "b", model, train={"steps": 2}, reward=reward)
    train(first)
    second = settings(tmp_path / "b", model, train={"steps": 4}, reward=reward)
    train(second, resume=True)
    assert all(
        policy_gap(final_tensors(whole), final_tensors(second), role) == 0 for role in ("policy", "behaviour", "ema")
    )
    rows = [json.loads(line) for line in (second.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3, 4]


def test_killed_at_any_moment_and_resumed_ends_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = settings(tmp_path / "whole", model, train={"steps": 6})
    train(whole)
    killed = settings(tmp_path / "killed", model, train={"steps": 6})
    code = (
        "import sys; from pathlib import Path\nfrom align.training.trainer import train\n"
        "from tiny_run import settings\n"
        "train(settings(Path(sys.argv[1]), Path(sys.argv[2]), train={'steps': 6}), resume=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "killed"), str(model)]
    metrics = killed.run_dir / "metrics.jsonl"
    for updates, extra in ((0, 0.0), (2, 0.03)):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and train_rows(metrics) < updates + 1:
            time.sleep(0.005)
        time.sleep(extra)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert train_rows(metrics) < 6
    summary = train(killed, resume=True)
    assert summary["status"] == "finished"
    gaps = [policy_gap(final_tensors(whole), final_tensors(killed), role) for role in ("policy", "behaviour", "ema")]
    assert gaps == [0, 0, 0]


def test_interrupt_leaves_a_resumable_run(model: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = settings(tmp_path / "whole", model, train={"steps": 5})
    train(whole)
    cut = settings(tmp_path / "cut", model, train={"steps": 5}, checkpoint={"every": 0})
    reward_calls = {"left": 7}  # four for the base's evaluation and the first rollouts

    import tiny_run as loop

    original = loop.redness

    def interrupting(media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        reward_calls["left"] -= 1
        if reward_calls["left"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(media, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "redness", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert json.loads((cut.run_dir / "summary.json").read_text())["status"] == "interrupted"
    train(cut, resume=True)
    assert policy_gap(final_tensors(whole), final_tensors(cut)) == 0


def test_existing_run_folder_is_never_written_over(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, train={"steps": 1})
    train(config)
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="--resume"):
        train(config)
    assert {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()} == before
    other = settings(tmp_path, model, train={"steps": 2, "weight_decay": 0.5})
    with pytest.raises(RunFolderError, match=r"train\.weight_decay: 0\.0001 then, 0\.5 now"):
        train(other, resume=True)
    train(other, overwrite=True)
    assert train_rows(config.run_dir / "metrics.jsonl") == 2
    stranger = tmp_path / "run2"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not a run folder"):
        train(settings(tmp_path, model, out=str(stranger)), overwrite=True)
    assert (stranger / "thesis.txt").read_text() == "mine"


def test_checkpoint_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    config = settings(tmp_path / "a", model, train={"steps": 1})
    train(config)
    text = (config.run_dir / "config.yaml").read_text()
    (config.run_dir / "config.yaml").write_text(text.replace("rank: 4", "rank: 8"))
    with pytest.raises(CheckpointError, match="another model or policy"):
        train(settings(tmp_path / "a", model, train={"steps": 2}, policy={"kind": "lora", "rank": 8}), resume=True)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["roles.safetensors", "optimizer.pt", "manifest.json"])
def test_truncated_checkpoint_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, train={"steps": 2})
    train(config)
    path = checkpoint.latest(config.run_dir / "checkpoints")
    assert path is not None
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])
    longer = settings(tmp_path, model, train={"steps": 3})
    with pytest.raises(CheckpointError, match=rf"{name}.*delete step-000002 to resume from the checkpoint before"):
        train(longer, resume=True)
    import shutil

    shutil.rmtree(path)
    assert train(longer, resume=True)["steps"] == 3


def test_full_disk_keeps_the_last_checkpoint(model: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: writing the next checkpoint fails half way."""
    config = settings(tmp_path, model, train={"steps": 1}, prompts={"heldout": None})
    train(config)
    code = (
        "import resource, sys; from pathlib import Path; from align.training.trainer import train; "
        "from tiny_run import settings\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "train(settings(Path(sys.argv[1]), Path(sys.argv[2]), train={'steps': 2}, prompts={'heldout': None}), "
        "resume=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path), str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "step-000001" in done.stderr or "space" in done.stderr or "large" in done.stderr
    assert checkpoint.list_steps(config.run_dir / "checkpoints") == [1]
    resumed = settings(tmp_path, model, train={"steps": 2}, prompts={"heldout": None})
    assert train(resumed, resume=True)["steps"] == 2


def test_a_run_goes_on_with_rollouts_of_another_size(model: Path, tmp_path: Path) -> None:
    sizes = {"sampler": {"kind": "ode", "steps": 3}}
    train(settings(tmp_path, model, train={"steps": 2}, rollout={"prompts": 2, "group": 4, **sizes}))
    config = settings(tmp_path, model, train={"steps": 4}, rollout={"prompts": 3, "group": 2, **sizes})
    train(config, resume=True)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows if row["event"] == "train"] == [8, 8, 6, 6]
