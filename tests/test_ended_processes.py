"""How a run on several processes ends early, and goes on: signals to the launcher, and a process that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from launched import ROOT
from tiny_run import final_tensors, settings

from align.config.load import dump_config
from align.config.settings import Config
from align.runs.checkpoint import latest
from align.training.trainer import train

BOUND = 60.0
"""Seconds in which a run of tiny steps must have ended."""
FULL = {"policy": {"kind": "full"}, "generator": {"dtype": "float32"}}
LAUNCH = "import sys; from alignflow.launch import launch; sys.exit(launch(sys.argv[1:], 2))"


def endless(folder: Path, model: Path, policy: str) -> Config:
    more: dict[str, Any] = FULL if policy == "full" else {}
    often = {"evaluate": {"every": 0, "at_start": False}, "samples": {"count": 0}}
    return settings(folder, model, train={"steps": 1_000_000}, checkpoint={"every": 1000}, **often, **more)


def steps(config: Config) -> list[int]:
    log = config.run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row["step"] for row in rows if row["event"] == "train"]


@contextmanager
def running(config: Config, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """``alignflow launch --processes 2 train``, once it has made a step."""
    file = folder / "config.yaml"
    file.write_text(dump_config(config))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", LAUNCH, "train", str(file)]
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:
        until = time.monotonic() + 240
        while not steps(config) and one.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        yield one


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["lora", "full"])
def test_sigterm_leaves_a_checkpoint_that_one_process_goes_on_from(policy: str, model: Path, tmp_path: Path) -> None:
    config = endless(tmp_path, model, policy)
    with running(config, tmp_path) as started:
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        said, errors = started.communicate(timeout=BOUND)
    assert started.returncode == 130, errors
    assert time.monotonic() - began < BOUND
    assert said.count("stopping after this step and its checkpoint") == 1
    last, kept = steps(config)[-1], latest(config.run_dir / "checkpoints")
    assert kept is not None
    assert kept.name == f"step-{last:06d}"
    before = final_tensors(config)
    on = config.model_copy(update={"train": config.train.model_copy(update={"steps": last + 1})})
    train(on, resume=True)
    assert steps(config) == [*range(1, last + 2)]
    assert any(not value.equal(before[name]) for name, value in final_tensors(config).items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_is_named_and_ends_the_other(model: Path, tmp_path: Path) -> None:
    config = endless(tmp_path, model, "lora")
    with running(config, tmp_path) as started:
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
        (second,) = (pid for pid, values in ranks.items() if b"RANK=1" in values)
        os.kill(int(second), signal.SIGKILL)
        _, errors = started.communicate(timeout=BOUND)
    assert started.returncode == 128 + signal.SIGKILL
    assert "error: process 1 on " in errors
    assert "was ended by SIGKILL" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
