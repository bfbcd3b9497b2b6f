"""Sweeps: alternatives between commas, checks before the first run, failures and resumption, Slurm arrays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import written

from align.runs.owned import SWEEP, read_mark
from align.sweeps.members import checked, members_of
from align.sweeps.running import Launcher, reason
from align.sweeps.words import axes_of, split
from alignflow.errors import ConfigError

run = written.run
ROOT = Path(__file__).resolve().parent.parent
FAKE = f"{sys.executable} {ROOT / 'tests' / 'swept.py'}"
PAIRS = """\
generator: {path: shapes, device: cpu}
prompts: {train: shapes:train, heldout: shapes:heldout}
reward: {kind: shapes}
recipe: {kind: KIND}
train: {steps: 4}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with two configs."""
    monkeypatch.chdir(tmp_path)
    for kind in ("nft", "awm"):
        Path(f"{kind}.yaml").write_text(PAIRS.replace("KIND", kind))
    return tmp_path


@pytest.fixture
def sweep(folder, run):
    """Run a sweep of three seeds with the stand-in -> (exit code, stdout, stderr)."""

    def runner(*words: str, config: str = "nft.yaml") -> tuple[int, str, str]:
        return run("sweep", config, "seed=0,1,2", "--out", "s", "--launcher", FAKE, *words)

    return runner


def calls() -> list[str]:
    return Path("calls.txt").read_text().splitlines()


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("[0.9,0.99]", ["[0.9,0.99]"]),
        ("[0.9,0.99], [0.9,0.999]", ["[0.9,0.99]", "[0.9,0.999]"]),
        ("{kind: nft, kl: 0},{kind: awm}", ["{kind: nft, kl: 0}", "{kind: awm}"]),
        ("'a, b',c", ["'a, b'", "c"]),
        ("'it''s, so',c", ["'it''s, so'", "c"]),
        ('"a\\", b",c', ['"a\\", b"', "c"]),
        ("it's,that's", ["it's", "that's"]),
        ("[[1,2],[3]],4", ["[[1,2],[3]]", "4"]),
        ("['a]', b],c", ["['a]', b]", "c"]),
        ("1,,2", ["1", "", "2"]),
        ("", [""]),
    ],
)
def test_commas_outside_brackets_and_quotes_separate(text, parts):
    assert split(text) == parts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.betas=[0.9,0.99]"], "nothing is varied"),
        (["seed=0,1,"], "seed (override 'seed=0,1,'): a value is empty"),
        (["seed=0,1", "seed=2,3"], "seed (override 'seed=2,3'): is varied twice"),
        (["name=a,b"], "name (override 'name=a,b'): is set by the sweep"),
        (["seed=0,1", "out=x"], "out (override 'out=x'): is set by the sweep"),
        (["seed=0,1", "more.yaml"], "config files come first"),
    ],
)
def test_wrong_words_are_said(words, said):
    with pytest.raises(ConfigError) as caught:
        axes_of("nft.yaml", words)
    assert said in str(caught.value)


def test_configs_with_commas_are_alternatives(folder):
    axes = axes_of("nft.yaml,awm.yaml", ["seed=0,1"])
    assert [member.name for member in members_of(axes)] == ["nft-seed-0", "nft-seed-1", "awm-seed-0", "awm-seed-1"]
    assert [member.label for member in members_of(axes)] == ["nft", "nft", "awm", "awm"]
    Path("a,b.yaml").touch()
    assert axes_of("a,b.yaml", ["seed=0,1"])[0].values == ("a,b.yaml",)
    with pytest.raises(ConfigError, match="'awm' does not"):
        axes_of("nft.yaml,awm", ["seed=0,1"])


def test_members_are_named_after_what_is_varied():
    axes = axes_of("nft.yaml", ["train.lr=1e-4,3e-4", "train.betas=[0.9,0.99],[0.9,0.999]", "train.steps=2"])
    first, *_, last = members_of(axes)
    assert (first.name, last.name) == ("lr-1e-4-betas-0.9-0.99", "lr-3e-4-betas-0.9-0.999")
    assert first.overrides == ("train.lr=1e-4", "train.betas=[0.9,0.99]", "train.steps=2")
    assert first.label == "train.lr 1e-4, train.betas [0.9,0.99]"
    same = members_of(axes_of("nft.yaml", ["a.x={b: 1},{b = 1}", "c.x=-1,1"]))
    assert [member.name for member in same] == [
        "a.x-b-1-c.x--1",
        "a.x-b-1-c.x-1",
        "a.x-b-1-c.x--1-2",
        "a.x-b-1-c.x-1-2",
    ]


# -- checks before the first run --------------------------------------------------------------------------------------


def test_all_members_are_checked_before_the_first_runs(sweep):
    code, _, err = sweep("train.lr=1e-3,-1", "recipe.kll=0")
    assert code == 2
    assert "train.lr (override 'train.lr=-1'): should be greater than or equal to 0" in err
    assert "(in 3 runs: seed-0-lr--1, seed-1-lr--1, seed-2-lr--1)" in err
    assert "no such setting 'kll'" in err
    assert err.count("no such setting 'kll'") == 1  # a problem of all runs is told once
    assert not Path("s").exists()


def test_the_same_run_twice_is_an_error(folder):
    with pytest.raises(ConfigError, match=r"the same run twice: train.lr=1e-3 and train.lr=0.001 give equal settings"):
        checked(members_of(axes_of("nft.yaml", ["train.lr=1e-3,0.001"])), folder)


def test_other_commands_are_refused(folder, run):
    Path("judge.yaml").write_text("data: {train: a.jsonl}\nmodel: shapes\n")
    code, _, err = run("sweep", "judge.yaml", "seed=0,1")
    assert code == 2
    assert "is for alignflow reward train" in err
    assert "a sweep runs training and searches" in err


def test_a_sweep_is_not_launched_in_several_processes(sweep, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "alignflow sweep --processes N, without launch" in sweep()[2]


def test_two_ways_to_start_a_run_are_one_too_many(sweep):
    code, _, err = sweep("--processes", "2")
    assert code == 2
    assert "--processes and --launcher are two ways" in err


def test_a_dry_run_lists_the_runs_and_writes_nothing(sweep):
    code, out, _ = sweep("--dry-run", config="nft.yaml,awm.yaml")
    assert code == 0
    assert out.splitlines()[0].split() == ["run", "config", "seed", "state"]
    assert out.splitlines()[5].split() == ["awm-seed-1", "awm", "1", "new"]
    assert "6 runs into s, 6 to be run; nothing was written" in out
    assert not Path("s").exists()


def test_merged_configs_that_replace_each_other_are_noted(folder, run):
    _, out, _ = run("sweep", "nft.yaml", "awm.yaml", "seed=0,1", "--dry-run")
    assert "note       configs side by side are merged; commas make them alternatives: a.yaml,b.yaml" in out


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_every_member_and_compares(sweep):
    code, out, err = sweep(config="nft.yaml,awm.yaml")
    assert (code, err.count("error")) == (0, 0)
    assert len(calls()) == 6
    assert out.count(": finished in ") == 6
    assert read_mark(Path("s"))["kind"] == SWEEP
    assert Path("s/compare.html").is_file()
    rows = [line.split() for line in out.splitlines()]
    assert ["nft", "3", "0.200", "0.300", "+0.100"] in [row[:5] for row in rows]  # 0.2, 0.3, 0.4 by seed
    assert "+0.348" in next(" ".join(row) for row in rows if row[:2] == ["nft", "3"])  # 0.1 + 4.303 * 0.1 / sqrt(3)


def test_a_failed_member_is_reported_and_the_others_go_on(sweep):
    Path("seed-1").write_text("fail")
    code, out, err = sweep()
    assert code == 1
    assert calls() == ["seed-0", "seed-1", "seed-2"]
    assert "[2/3] seed-1: failed after" in out
    assert "Not started: Left out of the sweep s, without results yet: seed-1." in err
    assert "error: seed-1 failed: the judge is not there" in err
    assert "1 of 3 runs failed; run them again with\n  alignflow sweep nft.yaml seed=0,1,2 --out s" in err
    Path("seed-1").unlink()
    code, out, _ = sweep("--resume")
    assert code == 0
    assert calls()[3:] == ["seed-1"]
    assert out.count("finished before") == 2


def test_an_unfinished_member_resumes(sweep):
    Path("seed-1").write_text("half")
    code, out, err = sweep()
    assert code == 1
    assert "seed-1 failed: ended by signal 9" in err
    assert "not finished (2 of 4 steps)" not in out
    Path("seed-1").unlink()
    code, out, _ = sweep("--dry-run")
    assert "unfinished (2 of 4 steps)" in out
    code, out, _ = sweep("--resume")
    assert code == 0
    assert "[2/3] seed-1: resumed after 2 of 4 steps" in out
    assert calls()[3:] == ["seed-1 --resume"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_or_killed_sweep_continues_where_it_stopped(folder, sweep, number, code):
    Path("seed-1").write_text("wait")
    words = ["sweep", "nft.yaml", "seed=0,1,2", "--out", "s", "--launcher", FAKE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "align", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        until = time.monotonic() + 60
        while not Path("waiting").exists() and time.monotonic() < until:
            time.sleep(0.05)
        started.send_signal(number)
        if number == signal.SIGINT:
            err = started.communicate()[1]
            assert "stopped; continue the sweep with\n  alignflow sweep nft.yaml seed=0,1,2 --out s" in err
        assert started.wait() == code
    if number == signal.SIGKILL:  # nobody can pass that on: the run itself goes on
        os.kill(int(Path("waiting").read_text()), signal.SIGKILL)
    Path("seed-1").unlink()
    assert calls() == ["seed-0", "seed-1"]
    assert sweep("--resume")[0] == 0
    assert calls()[2:] == ["seed-1 --resume", "seed-2"]


def test_a_folder_with_other_settings_is_refused(sweep):
    sweep()
    assert "add --resume to continue it" in sweep()[2]
    code, _, err = sweep("train.steps=8", "--resume")
    assert code == 2
    assert "s was made with other settings, so it cannot be continued:\n  seed-0: train.steps: 4 then, 8 now" in err
    code, _, err = sweep("recipe.kl=0,0.1", "--resume")
    assert "s holds 3 runs that this sweep does not have: seed-0, seed-1, seed-2" in err
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    assert "mine exists and is not a sweep" in sweep("--out", "mine")[2]
    Path("s/sweep.json").write_text("{")
    assert "s/sweep.json is damaged" in sweep("--resume")[2]


def test_a_sweep_can_be_extended(sweep, run):
    sweep()
    code, _, _ = run("sweep", "nft.yaml", "seed=0,1,2,3", "--out", "s", "--launcher", FAKE, "--resume")
    assert code == 0
    assert calls()[3:] == ["seed-3"]
    assert len(json.loads(Path("s/sweep.json").read_text())["members"]) == 4


def test_a_launcher_that_does_not_exist_fails_every_member(folder, run):
    code, _, err = run("sweep", "nft.yaml", "seed=0,1", "--out", "s", "--launcher", "no-such-launcher")
    assert code == 1
    assert "seed-0 failed: cannot start no-such-launcher: No such file or directory" in err
    assert "no comparison" in err


def test_launchers():
    assert Launcher().shown(["train"]) == ["alignflow", "train"]
    assert Launcher(4).shown(["train"]) == ["alignflow", "launch", "--processes", "4", "train"]
    assert [one.environment["RANK"] for one in Launcher(2).start(["train"])] == ["0", "1"]
    assert Launcher(words="torchrun -m align").start(["train", "a b"])[0].command == [
        "torchrun",
        "-m",
        "align",
        "train",
        "a b",
    ]


def test_the_reason_is_the_last_error_of_the_last_start(tmp_path):
    log = tmp_path / "log"
    log.write_text("$ alignflow train\nerror: old\n$ alignflow train --resume\nerror: new\n  more\nstep 3\n")
    assert reason(log, 1) == "new"
    assert reason(log, 137) == "ended by signal 9: new"
    log.write_text("$ alignflow train\nerror: old\n$ alignflow train --resume\n")
    assert reason(log, 1) == "exit code 1"


@pytest.mark.slow
def test_a_real_sweep_stops_and_resumes(tmp_path):
    """Ctrl-C ends the run in progress with a checkpoint; the second start finishes the sweep."""
    short = ["train.steps=3", "rollout.prompts=2", "rollout.group=2", "evaluate.every=0", "evaluate.prompts=3",
             "samples.count=2", "checkpoint.every=1", "evaluate.rewards={gold: {kind: shapes}}"]  # fmt: skip
    words = [
        sys.executable,
        "-m",
        "align",
        "sweep",
        str(ROOT / "configs/shapes/nft.yaml"),
        "train.lr=1e-3,2e-3",
        *short,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*words, "--out", "s"], cwd=tmp_path, env=environment) as started:
        until = time.monotonic() + 240
        while not list(tmp_path.glob("s/lr-1e-3/checkpoints/step-*")) and time.monotonic() < until:
            time.sleep(0.1)
        started.send_signal(signal.SIGINT)
        assert started.wait() == 130
    done = subprocess.run(
        [*words, "--out", "s", "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "s/lr-1e-3/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["event"] == "train"] == [1, 2, 3]
    assert (tmp_path / "s/compare.html").is_file()


# -- Slurm ------------------------------------------------------------------------------------------------------------


def array(task: int, code: int = 0) -> tuple[int, list[str]]:
    """Run one task of ``sweep.sh`` with stand-ins for the cluster's commands -> (exit code, what they were given)."""
    Path("bin").mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        path = Path("bin") / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {Path.cwd()}/given.txt\nexit {code}\n')
        path.chmod(0o755)
    Path("given.txt").unlink(missing_ok=True)
    job = {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_JOB_ID": "7",
        "PATH": f"{Path.cwd() / 'bin'}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "sweep.sh"], env={**os.environ, **job}, check=False)
    given = Path("given.txt").read_text().splitlines() if Path("given.txt").exists() else []
    return done.returncode, given


def test_slurm_array(folder, run):
    words = ["sweep", "nft.yaml,awm.yaml", "seed=0,1", "--out", "my runs"]
    code, out, _ = run(*words, "--processes", "2", "--slurm", "sweep.sh")
    assert code == 0
    assert "sweep.sh: an array of 4 runs into my runs; submit it with sbatch sweep.sh" in out
    text = Path("sweep.sh").read_text()
    assert "#SBATCH --array=0-3" in text
    assert "#SBATCH --cpus-per-task=2" in text
    code, given = array(3)
    assert code == 0
    assert given == [
        'srun alignflow launch --processes 2 train awm.yaml seed=1 name=awm-seed-1 out="my runs/awm-seed-1"'
    ]
    Path("my runs/awm-seed-1").mkdir()
    code, given = array(3, 130)
    assert code == 130
    assert given[0].endswith(" --resume")
    assert given[1] == "scontrol requeue 7_3"
    Path("my runs/awm-seed-1/summary.json").write_text('{\n  "status": "finished"\n}\n')
    assert array(3) == (0, [])
    assert array(4)[0] == 2
    assert run(*words, "--slurm", "sweep.sh", "--resume")[0] == 0
    Path("mine.sh").write_text("echo mine\n")
    assert "mine.sh exists and was not written by alignflow sweep" in run(*words, "--slurm", "mine.sh", "--resume")[2]
