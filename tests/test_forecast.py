"""Number of threads, and the forecast of a run: the choice, the counted calls, the time that is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from launched import launch
from test_latents import pairs
from tiny_run import some_slow

from align.data.prompts import Prompt
from align.policy.build import build_generator
from align.runs import threads
from align.runs.forecast import Forecast, Unit
from align.runs.progress import Progress, clock
from align.runs.threads import Speed
from align.training.foreseen import _spread, counted, foresee, units
from align.training.trainer import train
from alignflow import cores


@pytest.fixture
def free(monkeypatch):
    """No variable says a number of threads; torch's own comes back."""
    for name in (*cores.COUNTS, "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


def test_candidates_are_halves_of_the_cores():
    assert threads.candidates(6) == [6, 3, 1]
    assert threads.candidates(1) == [1]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: [10.0, 11.0, 30.0], 2: [6.0, 7.0, 8.0]}, 2),
        ({1: [10.0, 10.0, 10.0], 2: [9.9, 9.9, 9.9]}, 1),  # within 3 %: fewer threads disturb nobody
        ({1: [10.0, 10.0, 10.0], 2: [5.0, 16.0, 15.0]}, 1),  # one lucky call does not choose
        ({4: [3.0], 2: [2.0], 1: [4.0]}, 2),
    ],
)
def test_the_fastest_median_wins(seconds, best):
    assert threads.fastest(seconds) == best


def test_settings_and_variables_of_the_user_come_first(free):
    assert threads.fixed(3) == (3, "train.threads")
    assert threads.fixed(None) == (None, "")
    assert threads.fixed(None, before=2) == (2, "as in the run's first part")
    free.setenv("WORLD_SIZE", "4")
    free.setattr(cores, "cores", lambda: 9.0)
    assert threads.fixed(None) == (2, "9 cores for 4 processes")
    free.setenv("OMP_NUM_THREADS", "1")
    assert threads.fixed(None, before=2) == (None, "OMP_NUM_THREADS")


def test_libraries_are_set_up_unless_the_user_says_otherwise():
    mine: dict[str, str] = {}
    cores.set_up(mine)
    assert mine == {"OMP_WAIT_POLICY": "passive", "MKL_CBWR": "AUTO,STRICT"}
    given = {"OMP_WAIT_POLICY": "active", "MKL_CBWR": "COMPATIBLE"}
    now = dict(given)
    cores.set_up(now)
    assert now == given


BITS = """
import sys
from alignflow.cores import set_up
import os
set_up(os.environ)
import torch
torch.manual_seed(0)
a, b = torch.randn(3000, 96), torch.randn(3000, 64)
found = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    found.append(a.T @ b)
print([torch.equal(found[0], other) for other in found])
"""


def test_gradients_of_weights_do_not_depend_on_the_number_of_threads():
    """Sums over many rows are what threads divide; without MKL's variable their bits differ on some machines."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MKL_CBWR", *cores.COUNTS)}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    said = subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[True, True, True]"


def test_cores_of_a_container_with_a_quota(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cores.cores(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores.cores(tmp_path) == len(os.sched_getaffinity(0))


def test_measuring_chooses_and_changes_nothing_else(free, model: Path, tmp_path: Path):
    config = tiny_run.settings(tmp_path, model)
    generator = build_generator(config.generator, config.memory, torch.device("cpu"))
    free.setattr(cores, "cores", lambda: 2.0)
    free.setattr(threads, "ROUNDS", 1)
    state = torch.random.get_rng_state()
    speed = threads.settle(generator, [Prompt("a red cube")], 8)
    assert speed.threads == torch.get_num_threads()
    assert speed.threads in (1, 2)
    assert speed.said.startswith(f"threads: {speed.threads} of 2 cores (")
    assert speed.seconds
    assert generator.network_calls == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    free.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert threads.settle(generator, [Prompt("a red cube")], 8).said == "threads: 1 (OMP_NUM_THREADS)"
    free.setattr(threads, "SECONDS", 0.0)
    free.delenv("OMP_NUM_THREADS")
    assert "too long to compare" in threads.settle(generator, [Prompt("a red cube")], 8).said


EXACT = ("nft", "grpo", "flow_dpo", "awm", "dgpo", "vgpo")


@pytest.mark.parametrize("recipe", some_slow(EXACT))
def test_the_forecast_counts_the_calls_of_a_run(model: Path, tmp_path: Path, capsys, recipe):
    config = tiny_run.settings(
        tmp_path, model, recipe, train={"steps": 2, "updates": 2}, evaluate={"every": 1, "sampler": {"guidance": 2.0}}
    )
    assert counted(config)
    calls = train(config)["network_calls"]
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(("step 1/", "held-out")))
    said = next(number for number, line in enumerate(lines) if line.startswith("forecast: "))
    assert said < first
    assert lines[said].startswith(f"forecast: {calls:,} network calls (48 to sample, ")
    assert round(sum(unit.calls for unit in units(config, 4))) == calls


ODD = {
    "nft": ({"kind": "nft", "timesteps": 3}, {"prompts": 3, "group": 3}, 2),
    "three updates": ({"kind": "nft", "timesteps": 2, "kl": 0.1}, {"prompts": 2, "group": 5}, 3),
    "awm": ({"kind": "awm", "timesteps": 3, "ratio": "mean"}, {"prompts": 3, "group": 3}, 2),
    "dgpo": ({"kind": "dgpo", "timesteps": 3}, {"prompts": 3, "group": 2}, 2),
    "grpo": ({"kind": "grpo", "kl": 0.1}, {"prompts": 3, "group": 3, "sampler": {"kind": "flow_sde", "steps": 4}}, 2),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("case", ODD)
def test_odd_numbers_of_terms_are_counted_exactly(case: str, model: Path, tmp_path: Path, capsys) -> None:
    """The first update, which other roles do not compute, has more or fewer terms than its share of all."""
    recipe, rollout, updates = ODD[case]
    config = tiny_run.settings(
        tmp_path, model, recipe, rollout=rollout, train={"steps": 2, "updates": updates},
        prompts={"heldout": None}, evaluate={"every": 0, "at_start": False},
    )  # fmt: skip
    assert counted(config)
    ahead = units(config, 0)
    assert all(unit.learned == int(unit.learned) for unit in ahead)
    assert sum(unit.calls for unit in ahead) == train(config)["network_calls"]


def test_terms_of_updates_in_closed_form() -> None:
    assert _spread((0, 1, 2), 1, 3, 2) == (5, 4)  # slots 0 and 2 of samples 0 and 2, slot 1 of sample 1
    assert _spread((0, 2, 4), 2, 1, 2) == (2, 1)  # rows of pairs
    assert _spread((0, 3), 1, 1, 2) == (1, 1)


def test_terms_that_follow_from_the_scores_are_not_counted(model: Path, tmp_path: Path) -> None:
    """Winners of odd numbers of slots; even numbers divide alike wherever the winners stand."""
    for timesteps, exact in ((1, False), (2, True)):
        config = tiny_run.settings(tmp_path, model, {"kind": "flow_dpo", "timesteps": timesteps}, train={"updates": 2})
        assert counted(config) is exact


def test_the_process_with_the_most_work_decides(model: Path, tmp_path: Path) -> None:
    config = tiny_run.settings(tmp_path, model, rollout={"prompts": 5}, train={"steps": 1}, evaluate={"every": 1})
    alone, divided = units(config, 4), units(config, 4, shares=3)
    assert [one.calls for one in alone] == [one.calls for one in divided]
    shares = {"step": 2 / 5, "evaluate": 2 / 4}  # of 5 and of 4 prompts, two at most in a process
    for one, part in zip(alone, divided, strict=True):
        assert part.work == pytest.approx(shares[one.kind] * one.work)
        assert part.samples == pytest.approx(shares[one.kind] * one.samples)


SLOW = """
import json, sys, time
from pathlib import Path
from accelerate import PartialState
from align.runs import threads
from align.training.trainer import train
from tiny_run import settings
measured = threads.settle
def settle(*given, **how):
    found = measured(*given, **how)
    assert found.seconds
    assert how["shared"] == (sys.argv[4] == "shared")
    return threads.Speed(found.threads, found.said, [1000.0, 2000.0][PartialState().process_index])
import align.training.foreseen as foreseen
foreseen.settle = settle
train(settings(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3])))
"""


@pytest.mark.parametrize("how", ["alone", pytest.param("shared", marks=pytest.mark.slow)])
def test_two_processes_forecast_the_time_of_the_slower_one(how, model: Path, tmp_path: Path, monkeypatch) -> None:
    """Also where the network is sharded (FSDP2), so that each call needs both processes."""
    if how == "shared":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    sections = {
        "rollout": {"prompts": 3, "group": 2}, "train": {"steps": 1}, "prompts": {"heldout": None},
        "evaluate": {"every": 0, "at_start": False},
    }  # fmt: skip
    said = launch(2, tmp_path, SLOW, str(tmp_path), str(model), json.dumps(sections), how)
    (line,) = [line for line in said.splitlines() if line.startswith("forecast: ")]
    (unit,) = units(tiny_run.settings(tmp_path, model, **sections), 0, shares=2)
    assert f", {clock(2000 * unit.work)} here, scoring not included" in line
    assert line.startswith("forecast: about ")


@pytest.mark.parametrize("timesteps", [1, 2])
def test_the_forecast_counts_the_calls_of_a_run_on_stored_pairs(model: Path, tmp_path: Path, capsys, timesteps):
    """With one term per pair too, both updates have terms."""
    config = tiny_run.settings(
        tmp_path, model, {"kind": "flow_dpo", "timesteps": timesteps, "reference_every": 1}, reward=None,
        rollout={"kind": "pairs", "file": str(pairs(tmp_path)), "prompts": 2}, prompts={"heldout": None},
        train={"steps": 2, "updates": 2}, evaluate={"every": 0, "at_start": False},
    )  # fmt: skip
    assert counted(config)
    calls = train(config)["network_calls"]
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("forecast")).startswith(f"forecast: {calls:,} network calls")
    step = next(line for line in lines if line.startswith("step 1/2"))
    assert step.startswith("step 1/2  loss 0.")
    assert "pair accuracy" in step
    assert "reward" not in step


def test_a_resumed_run_forecasts_the_rest(model: Path, tmp_path: Path):
    config = tiny_run.settings(tmp_path, model, train={"steps": 3})
    whole, rest = units(config, 4), units(config, 4, done=2)
    assert whole[-len(rest) :] == rest
    assert [(unit.kind, unit.at) for unit in rest] == [("step", 3), ("evaluate", 3)]


def test_finished_units_replace_the_measured_time():
    ahead = [Unit("evaluate", 0, 10, 0, 5, 10), *(Unit("step", at, 20, 10, 8, 40) for at in (1, 2))]
    forecast = Forecast(ahead, 0.1)
    assert forecast.calls == 70
    assert forecast.left == pytest.approx(0.1 * 90)
    assert forecast.said() == "forecast: 70 network calls (40 to sample, 20 to learn, 10 held-out), 0:09 here, " + (
        "scoring not included"
    )
    forecast.finished("evaluate", 0, 2.0)  # a second of it for 5 samples beside network calls
    assert forecast.left == pytest.approx(2 * (4 + 8 * 0.2))
    forecast.finished("step", 1, 7.0)
    assert forecast.left == pytest.approx(7.0)
    forecast.finished("evaluate", 1, 9.0)  # none is due there
    assert forecast.left == pytest.approx(7.0)
    assert Forecast(ahead, None).left is None


def test_the_progress_line_counts_down_by_the_forecast(capsys, monkeypatch):
    progress = Progress(2)
    now = iter([0.0, 5.0, 8.0])
    monkeypatch.setattr("align.runs.progress.time.monotonic", lambda: next(now, 8.0))
    progress.foresee(Forecast([Unit("step", at, 1, 0, 0, work) for at, work in ((1, 1), (2, 60))], 100.0))
    progress.update(1, {})
    assert capsys.readouterr().out == "step 1/2  5:00 left\n"


@pytest.mark.parametrize(("compiled", "timed"), [("none", ["a cat"]), ("blocks", [])])
def test_calls_that_compile_are_not_timed(
    compiled: str, timed: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first calls of compiled blocks take minutes, and the rest of the run does not."""
    asked: list[str] = []

    def settled(generator: object, prompts: Sequence[str], rows: int, **how: object) -> Speed:
        asked.extend(prompts)
        return Speed(1, "", 0.1 if prompts else None)

    monkeypatch.setattr("align.training.foreseen.settle", settled)
    said: list[str] = []
    trainer = SimpleNamespace(
        config=tiny_run.settings(tmp_path, model, memory={"compile": compiled}), share=SimpleNamespace(world=1),
        generator=None, source=SimpleNamespace(prompts=["a cat"]),
        threads_before=None, accelerator=SimpleNamespace(autocast=nullcontext),
        processes=SimpleNamespace(sharded=False, objects=lambda mine: mine),
    )  # fmt: skip
    foresee(trainer, 0, 0, SimpleNamespace(say=said.append, foresee=lambda forecast: None))  # type: ignore[arg-type]
    assert asked == timed
    assert said[-1].startswith("forecast: ")
    assert said[-1].endswith("scoring not included") == bool(timed)


def test_the_line_counts_inside_a_step(model: Path, tmp_path: Path, capsys, monkeypatch):
    """Samples of the rollout, samples to score and terms of the updates, chunk by chunk."""
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Progress, "doing", lambda self, what, done=0, of=0: seen.append((what, done, of)))
    train(
        tiny_run.settings(
            tmp_path, model, rollout={"chunk": 4}, train={"steps": 1, "updates": 2, "chunk": 4},
            evaluate={"every": 0, "at_start": False}, prompts={"heldout": None},
        )
    )  # fmt: skip
    counts = {name: [(done, of) for what, done, of in seen if what == name and of] for name in ("rollout", "reward")}
    assert counts == {"rollout": [(0, 8), (4, 8)], "reward": [(0, 8), (4, 8)]}
    assert [(done, of) for what, done, of in seen if what == "update" and of] == [(4 * n, 16) for n in range(4)]
    monkeypatch.undo()
    capsys.readouterr()
    progress = Progress(2)
    progress.terminal = True
    progress.doing("update", 96, 384)
    progress.doing("evaluate")
    assert capsys.readouterr().out == "\x1b[2Kstep 0/2  learning 96/384 ...\r\x1b[2Kstep 0/2  evaluating ...\r"


def test_a_call_that_fails_is_left_to_the_run(free: None, model: Path, tmp_path: Path) -> None:
    config = tiny_run.settings(tmp_path, model)
    generator = build_generator(config.generator, config.memory, "cpu")
    before, generator.velocity = generator.network_calls, None  # type: ignore[assignment, method-assign]
    speed = threads.settle(generator, [Prompt("a cat")], 4)
    assert speed.seconds is None
    assert speed.threads == torch.get_num_threads()
    assert generator.network_calls == before
