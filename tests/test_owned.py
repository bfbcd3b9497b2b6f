"""What may be removed, who may write, and what a folder that was never quite made counts as."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.data.files import new_folder, write_text
from align.runs import lock as locks
from align.runs import metrics, owned
from align.runs.lock import Lock, locked
from align.runs.run_folder import RunFolder
from alignflow.errors import RunFolderError
from alignflow.files.disk import aside

CONFIG = "name: a\nseed: 0\n"


def made(folder: Path, kind: str = owned.TRAINING) -> Path:
    """A run folder as a run leaves it."""
    run = RunFolder(folder, kind=kind)
    run.enter(CONFIG, resume=False, overwrite=False)
    run.create(CONFIG, {"packages": {}})
    run.leave()
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", [owned.REWARD, owned.LATENT, owned.JUDGE, owned.TRAINING, owned.SEARCH, owned.NOISE])
@pytest.mark.parametrize("place", [".", "..", "thesis", "run", "link", "file", "home", "/"])
def test_nothing_but_a_folder_of_its_kind_is_removed(kind, place, tmp_path, monkeypatch):
    work = tmp_path / "work"
    (work / "thesis").mkdir(parents=True)
    (work / "thesis" / "chapter.txt").write_text("mine")
    (work / "file").write_text("mine")
    owned.mark(work, kind)  # even where the mark is there
    owned.mark(tmp_path, kind)
    made(work / "other", owned.SEARCH if kind == owned.TRAINING else owned.TRAINING)
    (work / "run").mkdir()
    owned.mark(work / "run", kind)
    (work / "run" / "notes.txt").write_text("mine")
    (work / "link").symlink_to("other")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work / "thesis"))
    target = Path("thesis" if place == "home" else place)
    if place == "home":
        owned.mark(target, kind)
    before = tree(tmp_path)
    with pytest.raises(RunFolderError):
        owned.check_removable(target, kind)
    with pytest.raises(RunFolderError):
        owned.check_out(target, kind, overwrite=True)
    with pytest.raises(RunFolderError):
        owned.check_removable(Path("other"), kind)
    assert tree(tmp_path) == before


def test_an_old_folder_goes_when_the_new_one_is_whole(tmp_path):
    old = tmp_path / "reward"
    old.mkdir()
    owned.mark(old, owned.REWARD)
    (old / "summary.json").write_text("old")
    owned.check_out(old, owned.REWARD, overwrite=True)

    def interrupted() -> None:
        with new_folder(old, replaces=True) as staging:
            write_text(staging / "summary.json", "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (old / "summary.json").read_text() == "old"
    with new_folder(old, replaces=True) as staging:
        write_text(staging / "summary.json", "new")
        assert (old / "summary.json").read_text() == "old"
    assert (old / "summary.json").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["reward"]
    with pytest.raises(RunFolderError, match="not empty"), new_folder(old):
        pytest.fail("the folder is there")


def test_litter_goes_by_name_and_nothing_else(tmp_path):
    theirs = [".git", ".gitignore", ".DS_Store", ".dvc", ".step-backup", ".config.yaml.original", ".x.alignflow-1"]
    for name in theirs:
        (tmp_path / name).write_text("theirs")
    (tmp_path / ".link.alignflow-0123456789ab").symlink_to(tmp_path / ".git")
    ours = [aside(tmp_path / "step-000003"), tmp_path / ".step-000003.abcd_123"]
    ours[0].mkdir()
    (ours[0] / "roles.safetensors").write_text("half")
    ours[1].mkdir()
    aside(tmp_path / "metrics.jsonl").write_text("half")
    (tmp_path / ".pytorch_lora_weights.safetensors.4711").write_text("half")
    owned.sweep(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {*theirs, ".link.alignflow-0123456789ab"}


def test_a_folder_that_was_never_quite_made_counts_as_new(tmp_path):
    whole = tree(made(tmp_path / "whole"))
    assert set(whole) == {".alignflow.json", "config.yaml", "environment.json"}
    for held in ([], [".alignflow.json"], [".alignflow.json", "config.yaml"], [".alignflow.json", "environment.json"]):
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            folder = tmp_path / f"part{len(list(tmp_path.iterdir()))}"
            (folder / "checkpoints").mkdir(parents=True)
            for name in held:
                (folder / name).write_bytes(whole[name])
            aside(folder / "config.yaml").write_text("half")
            run = RunFolder(folder)
            assert run.enter(CONFIG, resume=resume, overwrite=overwrite).before is None
            run.create(CONFIG, {"packages": {}})
            run.leave()
            assert set(tree(folder)) == set(whole)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "config.yaml").write_text("mine")
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder(stranger).enter(CONFIG, resume=False, overwrite=True)


def test_a_run_that_never_begins_leaves_no_folder(tmp_path):
    run = RunFolder(tmp_path / "deep" / "run")
    run.enter(CONFIG, resume=False, overwrite=False)
    run.leave()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "dangling"])
def test_places_where_no_run_can_live_are_named(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match=place.split("/")[0]):
            RunFolder(tmp_path / place).enter(CONFIG, resume=False, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"


def test_to_go_on_and_to_delete_are_not_asked_at_once(tmp_path):
    made(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(RunFolderError, match="give one of the two"):
        RunFolder(tmp_path / "run").enter(CONFIG, resume=True, overwrite=True)
    assert tree(tmp_path) == before


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    path = tmp_path / "lock"
    first = Lock(path, tmp_path / "run")
    first.take()
    with pytest.raises(RunFolderError, match=rf"run is in use by process {os.getpid()} on .* since 20"):
        Lock(path, tmp_path / "run").take()
    first.release()
    assert list(tmp_path.iterdir()) == []
    code = (
        "import sys, time; from pathlib import Path; from align.runs.lock import Lock\n"
        "Lock(Path(sys.argv[1]), Path('run')).take(); print('taken', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "taken\n"
    with pytest.raises(RunFolderError, match=f"process {other.pid}"):
        Lock(path, tmp_path / "run").take()
    other.kill()
    deadline = time.monotonic() + 10
    while locks._started(other.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)  # a zombie counts as gone: nobody has waited for it yet
    second = Lock(path, tmp_path / "run")
    second.take()
    second.release()
    other.wait()


@pytest.mark.parametrize(("changed", "age", "stale"), [
    ({"host": "elsewhere"}, 10, False),
    ({"host": "elsewhere"}, 1000, True),
    ({"started": "1"}, 0, True),  # another process has the number now
    ({"boot": "another"}, 1000, True),
])  # fmt: skip
def test_stale_locks_are_recognised(changed, age, stale, tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps({**locks._me(), **changed}))
    os.utime(path, (time.time() - age, time.time() - age))
    mine = Lock(path, tmp_path)
    if not stale:
        with pytest.raises(RunFolderError, match="on elsewhere"):
            mine.take()
        return
    mine.take()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_holds_its_folder_and_a_reward_the_place_of_its_own(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.enter(CONFIG, resume=False, overwrite=False)
    with pytest.raises(RunFolderError, match="is in use by process"):
        RunFolder(tmp_path / "run").enter(CONFIG, resume=False, overwrite=False)
    run.create(CONFIG, {"packages": {}})
    with pytest.raises(RunFolderError, match="is in use by process"):
        RunFolder(tmp_path / "run").enter(CONFIG, resume=False, overwrite=True)
    run.leave()
    again = RunFolder(tmp_path / "run")
    again.enter(CONFIG, resume=False, overwrite=True)
    again.create(CONFIG, {"packages": {}})
    assert (tmp_path / "run" / owned.LOCK).is_file()  # the folder that replaced the old one is held too
    again.leave()
    with locked(tmp_path / "reward"):
        with pytest.raises(RunFolderError, match="reward is in use by process"), locked(tmp_path / "reward"):
            pytest.fail("two writers")
        assert not (tmp_path / "reward").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}


def test_a_bad_row_costs_one_row(tmp_path):
    good = [json.dumps({"event": "train", "step": step}).encode() for step in range(1, 5)]
    bad = [b"", b"\xff\xfe", b"[1]", b'{"event": "train"}', b'{"step": true, "event": "train"}', b"{" * 100_000]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([good[0], *bad, *good[1:]]) + b'\n{"event": "tr')
    rows, unreadable = metrics.read(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert unreadable == len(bad) + 1
    assert metrics.keep_until(path, 3) == len(bad) + 1
    assert metrics.read(path) == (rows[:3], 0)


def test_a_block_holds_the_folder_and_leaves_nothing_of_a_run_that_never_began(tmp_path):
    place = tmp_path / "deep" / "run"

    def failing() -> None:
        with RunFolder(place).held(CONFIG, resume=False, overwrite=False):
            RunFolder(place).enter(CONFIG, resume=False, overwrite=False)

    with pytest.raises(RunFolderError, match="is in use by process"):
        failing()
    assert not (tmp_path / "deep").exists()
    run = RunFolder(place)
    with run.held(CONFIG, resume=False, overwrite=False):
        run.check_content(data="1", model="2")
        run.begin()
    mark = owned.read_mark(place)
    assert (mark["kind"], mark["data"], mark["model"]) == (run.kind, "1", "2")
    assert (place / "config.yaml").read_text() == CONFIG
    assert json.loads((place / "environment.json").read_text())["python"]
