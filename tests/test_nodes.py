"""Machines that share no run folder are told so before anything is loaded; clocks that differ are reported."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import launch

from align.runs.lock import Lock
from align.training import nodes
from alignflow.errors import RunFolderError, TrainingError


class Simulated:
    """The main process of two, on two machines; the other one answers as ``other`` does to what the main one says."""

    rank = 0

    def __init__(self, other: Callable[[Any], Any]) -> None:
        self.other = other

    def objects(self, mine: list[Any]) -> list[Any]:
        return [*mine, self.other(mine[0])]

    def sent(self, value: Any, owner: int) -> Any:
        return value

    def settled(self, work: Callable[[], Any]) -> Any:
        return work()


def test_a_file_that_another_machine_does_not_see_ends_the_run(tmp_path: Path) -> None:
    said = (
        f"process 1 on b does not see a new file in {tmp_path}, 20 s after process 0 on a wrote it: all machines need"
    )
    with pytest.raises(TrainingError, match=said):
        nodes.storage(tmp_path, ["a", "b"], Simulated(lambda seen: False))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_after_a_rename_ends_the_run(tmp_path: Path) -> None:
    answers = iter([True, False])
    with pytest.raises(TrainingError, match="process 1 on b reads the old content of a file that was replaced in"):
        nodes.storage(tmp_path, ["a", "b"], Simulated(lambda seen: next(answers)))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_shared_folder_is_used_and_left_empty(tmp_path: Path) -> None:
    nodes.storage(tmp_path, ["a", "b"], Simulated(lambda seen: seen))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_waited_for_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "WAIT", 0.2)
    (tmp_path / "there").write_text("old")
    began = time.monotonic()
    assert not nodes._sees(tmp_path / "there", "new")
    assert not nodes._sees(tmp_path / "nowhere", "new")
    assert 0.4 <= time.monotonic() - began < 2
    assert nodes._sees(tmp_path / "there", "old")


def test_the_clock_that_differs_most_is_named() -> None:
    assert nodes.clocks(["a", "b", "c"], [100.0, 104.0, 96.0]) == ""
    said = nodes.clocks(["a", "b", "c"], [1000.0, 1006.0, 880.0])
    assert said.startswith("the clock of c is 120 s behind that of a: no result depends on it")
    assert nodes.clocks(["a", "b"], [0.0, 42.0]).startswith("the clock of b is 42 s ahead of that of a")


def test_one_machine_is_compared_with_nothing(tmp_path: Path) -> None:
    nodes.check(tmp_path / "nowhere", Simulated(lambda mine: mine), print)  # type: ignore[arg-type]


def held_elsewhere(folder: Path, name: str, age: float) -> Lock:
    """The lock of a process on another machine, which touched it ``age`` seconds ago."""
    path = folder / name / ".lock"
    path.parent.mkdir()
    path.write_text('{"host": "elsewhere", "pid": 1, "time": "then"}')
    os.utime(path, (time.time() - age, time.time() - age))
    return Lock(path, path.parent)


@pytest.mark.parametrize("wrong", [-86_400.0, 0.0, 86_400.0])
def test_a_wrong_clock_takes_no_lock_from_a_living_holder_and_leaves_none_to_a_dead_one(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, dead = (held_elsewhere(tmp_path, name, age) for name, age in (("alive", 10.0), ("dead", 1000.0)))
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + wrong)
    with pytest.raises(RunFolderError, match="in use by process 1 on elsewhere"):
        alive.take()
    assert [file.name for file in (tmp_path / "alive").iterdir()] == [".lock"]
    dead.take()
    dead.release()


APART = """
import os, sys, time
from pathlib import Path
from align.training import nodes, trainer
from alignflow.errors import TrainingError
from tiny_run import settings
folder, model, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
trainer.build_generator = None  # nothing may be loaded
nodes.WAIT = 1.0
nodes._machine = lambda: (f"machine{rank}", "")
right = time.time
nodes.time.time = lambda: right() + 100 * rank
config = settings(folder, model)
if rank:
    trainer.RunFolder.path = property(lambda run: folder / "elsewhere", lambda run, path: None)
try:
    trainer.train(config)
except TrainingError as error:
    (folder / str(rank)).write_text(str(error))
"""


@pytest.mark.slow
def test_two_machines_without_shared_storage_stop_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    printed = launch(2, tmp_path, APART, str(tmp_path), str(model))
    said = [(tmp_path / rank).read_text() for rank in "01"]
    assert said[0] == said[1].replace("elsewhere", "run")
    assert said[0].startswith("process 1 on machine1 does not see a new file in ")
    assert "the clock of machine1 is 100 s ahead of that of machine0" in printed
    assert not (tmp_path / "run").exists()
