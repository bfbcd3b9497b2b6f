"""``alignflow ui``: which runs are listed and how, who is answered, and folders that are not as they should be."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_run import build_run
from served import page

from align.cli.app import main
from align.report.reading import read_run
from align.runs import owned
from align.runs.lock import Lock, in_use
from align.ui.guarded import listening
from align.ui.runs import Runs, card_of, time_left
from align.ui.server import create_app, report_of, serve
from alignflow.errors import ConfigError, RunFolderError

TOKEN = "a token of a test"


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Any]:
    with page(lambda port: create_app(folder, TOKEN, port), TOKEN) as ask:
        yield ask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two finished runs, one of them in a folder of its own."""
    build_run(tmp_path / "runs" / "honest", visits=2)
    build_run(tmp_path / "runs" / "sweep" / "hacked", "hacked", visits=2)
    return tmp_path / "runs"


def unfinished(folder: Path, rows: int = 29) -> Path:
    """A run after its first ``rows`` rows, with a line cut off in the middle."""
    run = build_run(folder, visits=2)
    lines = (run / "metrics.jsonl").read_text().splitlines()[:rows]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"event": "tra']))
    (run / "summary.json").unlink()
    return run


# -- cards ------------------------------------------------------------------------------------------------------------


def test_a_finished_run(folder):
    card = next(one for one in Runs(folder).cards() if one.key == "honest")
    assert (card.name, card.state, card.recipe, card.generator) == (
        "shapes-nft-honest",
        "finished",
        "nft",
        "sd3: shapes",
    )
    assert (card.tone, card.verdict) == ("good", "Gold rose from 0.352 to 0.597.")
    assert [(one.label, one.before, one.after, one.change, one.tone) for one in card.scores] == [
        ("gold", "0.352", "0.597", "+0.245", "up"), ("trained reward", "0.440", "0.706", "+0.266", "up"),
    ]  # fmt: skip
    assert (card.done, card.planned, card.left, card.report, card.problem) == (60, 60, "", True, "")
    assert card.images[0] == (60, 0, "a red circle above a blue square")
    assert len(card.images) == 4


def test_a_run_in_training_has_a_time_left_and_a_killed_one_is_stopped(tmp_path):
    run = unfinished(tmp_path / "run")
    assert time_left(read_run(run)) == pytest.approx(4.0 * (60 - 26))  # 4 s a step; rows 1, 12 and 23 are evaluations
    assert Runs(tmp_path).cards()[0].state == "stopped"
    lock = Lock(run / owned.LOCK, run)
    lock.take()
    try:
        assert in_use(run)
        card = Runs(tmp_path).cards()[0]
        assert (card.state, card.done, card.planned, card.left) == ("training", 26, 60, "2 min 16 s")
    finally:
        lock.release()
    assert not in_use(run)


def test_time_left_needs_a_plan_and_two_steps(tmp_path):
    assert time_left(read_run(unfinished(tmp_path / "one", rows=2))) is None
    run = unfinished(tmp_path / "two")
    (run / "config.yaml").write_text("name: x\n")
    assert time_left(read_run(run)) is None


def test_runs_in_training_come_first_then_those_that_changed_last(folder):
    run = unfinished(folder / "zz")
    lock = Lock(run / owned.LOCK, run)
    lock.take()
    try:
        assert [card.key for card in Runs(folder).cards()] == ["zz", "sweep/hacked", "honest"]
    finally:
        lock.release()


def test_a_run_is_read_again_only_when_its_files_change(folder, monkeypatch):
    runs, read = Runs(folder), []
    monkeypatch.setattr("align.ui.runs.card_of", lambda key, path, busy: read.append(key) or card_of(key, path, busy))
    runs.cards()
    runs.cards()
    assert sorted(read) == ["honest", "sweep/hacked"]
    (folder / "honest" / "summary.json").unlink()
    assert next(one for one in runs.cards() if one.key == "honest").state == "stopped"
    assert sorted(read) == ["honest", "honest", "sweep/hacked"]


def test_a_search_and_a_folder_that_is_a_run(tmp_path):
    run = build_run(tmp_path / "honest", visits=1)
    assert [card.key for card in Runs(run).cards()] == ["."]
    search = tmp_path / "found"
    (search / "candidates" / "0000").mkdir(parents=True)
    (search / "config.yaml").write_text("name: best\nsearch: {kind: best_of_n}\nprompts: {limit: 4}\n")
    owned.mark(search, owned.SEARCH)
    card = next(one for one in Runs(tmp_path).cards() if one.key == "found")
    assert (card.kind, card.recipe, card.done, card.planned, card.problem) == ("search", "best_of_n", 1, 4, "")
    assert (card.state, card.verdict, card.report) == ("stopped", "The search has not ended.", False)


# -- damage -----------------------------------------------------------------------------------------------------------


def test_one_damaged_run_does_not_hide_the_others(folder):
    broken = folder / "honest"
    (broken / "metrics.jsonl").write_bytes(b'{"event": "eval", "step": 0, "scores": 3}\nnot json\n\xff\xfe\n')
    (broken / "summary.json").write_text("[]")
    (broken / "samples" / "step-000060" / "prompts.json").write_text('{"prompts": ["a"], "scores": 3, "seeds": [1]}')
    (broken / "config.yaml").write_text("a: [")
    cards = {card.key: card for card in Runs(folder).cards()}
    assert cards["sweep/hacked"].verdict.startswith("The trained reward rose, but gold fell")
    assert cards["honest"].verdict or cards["honest"].problem
    (folder / "search").mkdir()
    (folder / "search" / "config.yaml").write_text("name: s\n")
    (folder / "search" / "results.json").write_text("{")
    owned.mark(folder / "search", owned.SEARCH)
    card = next(one for one in Runs(folder).cards() if one.key == "search")
    assert card.problem.startswith("one of its files is damaged (")


def test_folders_that_are_not_there_or_hold_no_runs(tmp_path, capsys):
    with pytest.raises(RunFolderError, match="name the folder that holds your runs"):
        serve(tmp_path / "none", 0)
    assert Runs(tmp_path).cards() == []
    with served(tmp_path) as ask:
        found = ask("/runs")[1]
        assert (found["runs"], found["problem"]) == ([], "")
        shutil.rmtree(tmp_path)
        assert ask("/runs")[1]["problem"] == f"{tmp_path.resolve()} was deleted"


def test_a_run_that_was_deleted_meanwhile(folder):
    with served(folder) as ask:
        assert ask("/report?run=honest")[0] == 200
        shutil.rmtree(folder / "honest")
        status, found = ask("/report?run=honest")
        assert status == 404
        assert "was it deleted?" in found["error"]
        assert [run["key"] for run in ask("/runs")[1]["runs"]] == ["sweep/hacked"]


# -- the server -------------------------------------------------------------------------------------------------------


def test_reports_are_made_from_what_is_there_now(folder):
    run = unfinished(folder / "going")
    with served(folder) as ask:
        status, content = ask("/report?run=going")
        assert (status, b"26 of 60 steps" in content) == (200, True)
        assert ask.headers["Refresh"] is None
        lock = Lock(run / owned.LOCK, run)
        lock.take()
        ask("/report?run=going")
        lock.release()
        assert ask.headers["Refresh"] == "20"
        assert "img-src data:" in ask.headers["Content-Security-Policy"]
    assert not (run / "report.html").exists()  # nothing is written
    owned.mark(run, owned.SEARCH)
    with pytest.raises(RunFolderError, match="has no report yet"):
        report_of(run)


def test_chosen_runs_are_compared(folder):
    build_run(folder / "other", visits=1)
    with served(folder) as ask:
        status, content = ask("/compare?run=honest&run=sweep/hacked")
        assert status == 200
        assert b"Made by alignflow, only from the files of these runs." in content
        assert ask("/compare?run=honest")[0] == 422
        assert ask("/compare?run=honest&run=../other")[0] == 404
        (folder / "other" / "config.yaml").write_text("reward: {kind: ocr}\n")
        (folder / "other" / "metrics.jsonl").write_text("")
        status, said = ask("/compare?run=honest&run=other")
        assert (status, bool(said["error"])) == (500, True)


def test_images_are_those_of_the_runs_alone(folder, tmp_path):
    (tmp_path / "outside" / "samples" / "step-000000").mkdir(parents=True)
    shutil.copytree(folder / "honest", tmp_path / "elsewhere")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    with served(folder) as ask:
        assert ask("/image?run=honest&step=60&row=0")[1].startswith(b"\x89PNG")
        for run in ("../elsewhere", "link", "honest/..", "", "%2e%2e/elsewhere", str(tmp_path / "elsewhere")):
            assert ask(f"/image?run={run}&step=60&row=0")[0] == 404
            assert ask(f"/report?run={run}")[0] == 404
        assert ask("/image?run=honest&step=59&row=0")[0] == 404
        assert ask("/image?run=honest&step=60&row=../../x")[0] == 422


def test_only_this_machine_with_the_token_is_answered(folder):
    with served(folder) as ask:
        for path in ("/", "/runs", "/report?run=honest", "/image?run=honest&step=60&row=0"):
            assert ask(path)[0] == 200
            assert ask(path, token=None)[0] == ask(path, token="another")[0] == 401
            assert ask(path, host="evil.example")[0] == ask(path, origin="http://evil.example")[0] == 403
            assert ask(path, body={})[0] == 405  # nothing is written
        status, said = ask("/", token=None, accept="text/html")
        assert (status, b"open the address that alignflow ui printed" in said) == (401, True)
        content = ask("/")[1]
        assert b"--gold: #b27a08" in content  # the style of the reports
        assert TOKEN.encode() not in content


def test_a_port_in_use_is_said_with_one_that_is_free(folder):
    with (
        listening(0) as (_, port),
        pytest.raises(ConfigError, match=rf"127.0.0.1:{port}: .*; try --port (\d+)") as error,
    ):
        serve(folder, port)
    other = int(str(error.value).rpartition(" ")[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", other))
    assert other > port


def test_the_command_needs_its_extra(folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(SystemExit) as ended:
        main(["ui", str(folder)])
    assert ended.value.code == 2
    assert "alignflow ui needs the package uvicorn" in capsys.readouterr().err


def test_cards_are_json(folder):
    with served(folder) as ask:
        runs = ask("/runs")[1]["runs"]
    assert json.loads(json.dumps(runs)) == runs
    assert [run["key"] for run in runs] == ["sweep/hacked", "honest"]
