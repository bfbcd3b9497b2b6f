"""Starting safely: several processes, files that hide packages, ``import alignflow`` from anywhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import alignflow
from align.runs.stopping import GracefulStop
from alignflow.launch import launch

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "configs" / "shapes" / "nft.yaml"
SHORT = ("train.steps=1", "rollout.prompts=2", "rollout.group=2", "evaluate.every=0", "evaluate.prompts=3",
         "samples.count=0", "evaluate.at_start=false", "evaluate.rewards={}", "evaluate.gold=null")  # fmt: skip
WITH_ROOT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COMMAND = (sys.executable, "-P", "-c", "import sys; sys.argv[0] = 'alignflow'; from align.cli.app import main; main()")


@pytest.mark.parametrize("own", [(), ("rewards.py", "align.py", "generators.py", "alignflow.py")])
def test_import_from_any_folder(tmp_path, own):
    for name in own:
        (tmp_path / name).write_text("raise SystemExit('the wrong module')\n")
    code = "import alignflow, sys; alignflow.load_config, alignflow.ConfigError; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=WITH_ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_every_public_name_is_there():
    assert {"train", "search", "score", "load_config", "load_generator", "load_reward"} <= set(dir(alignflow))
    assert all(getattr(alignflow, name) is not None for name in alignflow.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = alignflow.nothing


@pytest.mark.parametrize("name", ["rewards", "generators", "alignflow"])
@pytest.mark.parametrize("module", ["align", "align.cli"])
def test_a_file_that_hides_a_package_is_named(tmp_path, name, module):
    (tmp_path / f"{name}.py").write_text("")
    command = [sys.executable, "-m", module, "check", str(SHAPES)]
    done = subprocess.run(command, cwd=tmp_path, env=WITH_ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / name}.py hides alignflow's package {name}: rename it")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_launch_trains_on_two_processes_with_ones_own_rewards(tmp_path):
    (tmp_path / "rewards.py").write_text("def red(media, prompts):\n    return media.mean(dim=(1, 2, 3))\n")
    words = ("launch", "--processes", "2", "train", str(SHAPES), *SHORT, "reward.kind=rewards.py:red", "--out", "two")
    done = subprocess.run([*COMMAND, *words], cwd=tmp_path, env=WITH_ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("status ") == 1
    assert (tmp_path / "two" / "summary.json").is_file()


def test_one_exit_code_for_all(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert launch(["check", "gone.yaml"], 2) == 2
    assert capfd.readouterr().err.count("no config file gone.yaml") >= 1
    assert launch(["--version"], 3) == 0


def test_signals_reach_every_process(tmp_path):
    code = (
        "import alignflow.launch as it, sys; it._START = 'import os, time, signal, pathlib;"
        'signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(os.environ["RANK"] + ".told").touch(), os._exit(7)));'
        'pathlib.Path(os.environ["RANK"] + ".up").touch(); time.sleep(60)\'; sys.exit(it.launch([], 3))'
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], cwd=tmp_path, env=WITH_ROOT) as started:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("*.up"))) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 7
    assert len(list(tmp_path.glob("*.told"))) == 3


def test_a_process_that_fails_ends_the_others(tmp_path):
    code = (
        'import alignflow.launch as it, sys; it._START = \'import os, sys, time; os.environ["RANK"] == "1" and '
        "sys.exit(5); time.sleep(60)'; sys.exit(it.launch([], 2))"
    )
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=WITH_ROOT)
    assert done.returncode == 5
    assert time.monotonic() - before < 50  # the other sleeps for 60


def test_a_process_that_was_killed_is_named(tmp_path):
    code = (
        'import alignflow.launch as it, sys; it._START = \'import os, signal, time; os.environ["RANK"] == "3" and '
        "os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)'; sys.exit(it.launch([], 2, nodes=2, node=1))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=WITH_ROOT, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGKILL
    assert "error: process 3 on " in done.stderr
    assert "was ended by SIGKILL (out of memory is the usual cause); ending the other 1 here" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_of_the_scheduler_asks_a_run_to_stop(number):
    said = []
    with GracefulStop(said.append) as stop:
        signal.raise_signal(number)
        assert stop.asked
    assert said == ["stopping after this step and its checkpoint; interrupt again to stop at once"]
