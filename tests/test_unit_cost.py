"""Cost per unit of gain: closed forms, which steps count, and the words where there is no gain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compared_runs import training
from report_run import Page, build_run

from align.report import write_report
from align.report.reading import read_run
from align.report.unit_cost import UnitCost, unit_cost
from align.report.verdict import changes

RISE = [0.4, 0.5, 0.4, 0.5]
"""Gold of four prompts after training that had none: a mean of 0.45 with a standard error of 0.05 / sqrt(3)."""


def of(folder: Path) -> UnitCost | None:
    run = read_run(folder)
    return unit_cost(run, changes(run))


def test_the_cost_of_the_training_steps_is_divided_by_the_gain(tmp_path: Path) -> None:
    found = of(training(tmp_path / "run", RISE))  # four steps of 100 network calls and 32 samples
    assert found is not None
    assert (found.name, found.gain, found.reason) == ("gold", "+0.450", "")
    assert [(label, value) for label, value, _ in found.values] == [("network calls", "889"), ("samples scored", "284")]
    # t of 3 degrees of freedom is 3.182: the gain lies between 0.3581 and 0.5419
    assert [interval for _, _, interval in found.values] == ["738 to 1,120", "236 to 357"]


def test_evaluations_and_steps_after_the_last_one_do_not_count(tmp_path: Path) -> None:
    folder = training(tmp_path / "run", RISE)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "train", "step": 5, "samples": 32, "network_calls": 10**6}) + "\n")
    found = of(folder)
    assert found is not None
    assert found.values[0][:2] == ("network calls", "889")


@pytest.mark.parametrize(
    ("after", "why"),
    [
        ([0.4, -0.5, 0.4, -0.3], "the interval of its change includes zero"),
        ([-0.4, -0.5, -0.4, -0.5], "it fell"),
        ([0.0] * 4, "it did not change"),
        ([0.5], "the certainty of its change is unknown"),
    ],
)
def test_without_a_gain_the_reason_stands_in_its_place(tmp_path: Path, after: list[float], why: str) -> None:
    folder = training(tmp_path / "run", after)
    found = of(folder)
    assert found is not None
    assert found.values == []
    assert found.reason == f"There is no cost per unit of gold: {why}, so there is no gain to divide by."
    assert found.reason in Page(write_report(folder)).text


def test_the_trained_reward_takes_the_place_of_a_missing_gold(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", visits=0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        for part in ("scores", "stderr") if row["event"] == "eval" else ():
            del row[part]["gold"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "summary.json").unlink()
    found = of(folder)
    assert found is not None
    assert (found.name, found.gain) == ("the trained reward", "+0.266")
    assert "Cost per unit of the trained reward" in Page(write_report(folder)).text


def test_the_time_is_that_of_the_phases(tmp_path: Path) -> None:
    page = Page(write_report(build_run(tmp_path / "run", visits=0)))
    assert "Cost per unit of gold" in page.text
    assert "without evaluations, divided by the gain of +0.245" in page.text
    found = of(tmp_path / "run")
    assert found is not None
    assert found.values[2][:2] == ("time", "16 min 20 s")  # 60 steps of about 4.0 s / 0.245
    pairs = training(tmp_path / "pairs", RISE, rollout__kind="pairs")
    stored = of(pairs)
    assert stored is not None
    assert [label for label, _, _ in stored.values] == ["network calls", "samples trained on"]
