"""The labelling page: who may ask, what a vote writes, two tabs, damaged tables, and training on the votes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import page
from tiny_run import settings

from align.data.media import write_media
from align.data.pair_table import read_judged
from align.data.prompts import read_stored
from align.labelling.server import create_app
from align.labelling.votes import Votes, read_candidates
from align.rollout.sources import Share, StoredSource
from align.training.trainer import train
from alignflow.errors import DataError, RunFolderError
from generators.load import load

TOKEN = "a token of a test"


def table(folder: Path, prompts: int = 4, each: int = 2) -> Path:
    """Samples of a few prompts; the second of each pair is brighter."""
    lines = []
    for number in range(prompts):
        for k in range(each):
            write_media(folder / f"{number}-{k}.png", torch.full((3, 16, 16), 0.2 + 0.3 * k))
            lines.append(json.dumps({"prompt": f"a cat {number}", "sample": f"{number}-{k}.png"}))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder / "samples.jsonl"


@contextlib.contextmanager
def served(source: Path, votes: Path, user: str = "") -> Iterator[Any]:
    """A server in a thread; yields a function that asks it."""
    with Votes(votes, user, lambda line: None) as kept:
        pairs = read_candidates(source)
        with page(lambda port: create_app(pairs, kept, TOKEN, port), TOKEN) as ask:
            yield ask


def test_votes_are_a_table_that_both_trainings_read(tmp_path: Path) -> None:
    source, votes = table(tmp_path), tmp_path / "out" / "votes.jsonl"
    with served(source, votes, "ann") as ask:
        for choice in ("left", "right", "tie"):
            pair = ask("/next")[1]["pairs"][0]
            status, found = ask("/vote", {"pair": pair["key"], "choice": choice, "seconds": 1.5})
            assert status == 200
            rows = [json.loads(line) for line in votes.read_text().splitlines()]  # on disk before the answer
            assert rows[-1]["pair"] == pair["key"]
            chosen = {"left": 0, "right": 1}.get(choice)
            if chosen is not None:
                side = read_candidates(source)[len(rows) - 1].sides[chosen]
                assert (votes.parent / rows[-1]["chosen"]).samefile(side)
        assert (found["done"], found["of"]) == (3, 4)
    judged = read_judged(str(votes))
    assert [one.outcome for one in judged] == [1.0, 1.0, 0.0]
    assert {one.user for one in judged} == {"ann"}
    assert len(read_stored(str(votes), ("chosen", "rejected"))) == 3


def test_a_run_learns_from_votes_and_leaves_out_ties(model: Path, tmp_path: Path) -> None:
    source, votes = table(tmp_path), tmp_path / "votes.jsonl"
    with served(source, votes) as ask:
        for choice in ("left", "tie", "right", "left"):
            ask("/vote", {"pair": ask("/next")[1]["pairs"][0]["key"], "choice": choice, "seconds": 0})
        config = settings(
            tmp_path, model, "flow_dpo", rollout={"kind": "pairs", "file": str(votes), "prompts": 2}, reward=None,
            prompts={"heldout": None}, train={"steps": 2},
        )  # fmt: skip
        assert train(config)["steps"] == 2  # while the page is open
    assert len(StoredSource(config, load("sd3", model), Share()).prompts) == 3


def test_only_this_machine_with_the_token_is_answered(tmp_path: Path) -> None:
    with served(table(tmp_path), tmp_path / "votes.jsonl") as ask:
        key = ask("/next")[1]["pairs"][0]["key"]
        for path, body in (("/", None), ("/next", None), (f"/media/{key}/left", None), ("/undo", {})):
            assert ask(path, body, token=None)[0] == 401
            assert ask(path, body, token="another")[0] == 401
            assert ask(path, body, host="evil.example")[0] == 403
        assert b"alignflow label" in ask("/")[1]
        assert ask(f"/media/{key}/left")[1].startswith(b"\x89PNG")
        assert ask(f"/media/{key}/..%2f..%2fetc")[0] == 404
        assert ask("/media/unknown/left")[0] == 404
        assert ask("/vote", {"pair": key, "choice": "both", "seconds": 0})[0] == 422


def test_two_tabs_on_one_pair_leave_one_vote(tmp_path: Path) -> None:
    with served(table(tmp_path), tmp_path / "votes.jsonl") as ask:
        first, second = (ask("/next")[1]["pairs"][0]["key"] for _ in range(2))
        assert first == second
        replies: list[int] = []
        body = {"pair": first, "choice": "left", "seconds": 0}
        tabs = [threading.Thread(target=lambda: replies.append(ask("/vote", body)[0])) for _ in range(8)]
        for tab in tabs:
            tab.start()
        for tab in tabs:
            tab.join()
        assert sorted(replies) == [200] + [409] * 7
        assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1
        assert "vote already" in ask("/vote", body)[1]["error"]


def test_a_vote_can_be_undone_and_a_pair_skipped(tmp_path: Path) -> None:
    with served(table(tmp_path), tmp_path / "votes.jsonl") as ask:
        first, second = (pair["key"] for pair in ask("/next")[1]["pairs"])
        assert ask(f"/next?after={first}")[1]["pairs"][0]["key"] == second
        ask("/vote", {"pair": first, "choice": "left", "seconds": 0})
        found = ask("/undo", {})[1]
        assert (found["done"], found["pairs"][0]["key"]) == (0, first)
        assert (tmp_path / "votes.jsonl").read_text() == ""
        assert ask("/undo", {})[0] == 404


def test_a_table_cut_off_in_a_line_is_mended_and_nothing_is_lost(tmp_path: Path) -> None:
    source, votes = table(tmp_path), tmp_path / "votes.jsonl"
    with served(source, votes) as ask:
        for _ in range(2):
            ask("/vote", {"pair": ask("/next")[1]["pairs"][0]["key"], "choice": "left", "seconds": 0})
    whole = votes.read_text()
    votes.write_text(whole + '{"prompt": "a ca')
    said: list[str] = []
    with Votes(votes, "", said.append) as kept:
        assert len(kept.rows) == 2
    assert votes.read_text() == whole
    assert (tmp_path / "votes.jsonl.cut").read_text() == '{"prompt": "a ca'
    assert said == [f"{votes}: its last line was incomplete and was moved to votes.jsonl.cut"]
    votes.write_text("not json\n" + whole)
    with pytest.raises(DataError, match=r"votes.jsonl line 1: not JSON"), Votes(votes, "", said.append):
        pass
    assert not (tmp_path / "votes.jsonl.lock").exists()


def test_one_server_at_a_time_writes_a_table(tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    with Votes(votes), pytest.raises(RunFolderError, match="process"), Votes(votes):
        pass


def test_pairs_come_from_tables_and_from_folders_of_samples(tmp_path: Path) -> None:
    source = table(tmp_path, prompts=2, each=3)
    pairs = read_candidates(source)
    assert [pair.prompt.text for pair in pairs] == ["a cat 0", "a cat 1"]
    assert [pair.key for pair in read_candidates(source)] == [pair.key for pair in pairs]
    sides = [read_candidates(source, seed)[0].sides[0].name for seed in range(8)]
    assert set(sides) == {"0-0.png", "0-1.png"}
    (tmp_path / "moved").mkdir()
    moved = table(tmp_path / "moved", prompts=2, each=3)
    assert [pair.key for pair in read_candidates(moved)] == [pair.key for pair in pairs]  # its votes stay valid
    made = tmp_path / "made.jsonl"
    made.write_text('{"prompt": "a cat", "chosen": "0-0.png", "rejected": "0-1.png"}\n')
    assert len(read_candidates(made)) == 1
    folder = tmp_path / "sampled"
    folder.mkdir()
    for number in range(4):
        write_media(folder / f"{number:03d}.png", torch.rand(3, 8, 8))
    (folder / "prompts.json").write_text(json.dumps({"prompts": ["a", "a", "b", "b"], "seeds": [0, 1, 2, 3]}))
    assert [pair.prompt.text for pair in read_candidates(folder)] == ["a", "b"]
    for bad, message in ((tmp_path, "not a folder that alignflow sample wrote"), (tmp_path / "no.jsonl", "no.jsonl")):
        with pytest.raises(DataError, match=message):
            read_candidates(bad)
    alone = tmp_path / "alone.jsonl"
    alone.write_text('{"prompt": "a cat", "sample": "0-0.png"}\n')
    with pytest.raises(DataError, match="no prompt has two samples"):
        read_candidates(alone)


def test_a_table_of_ties_alone_teaches_nothing(model: Path, tmp_path: Path) -> None:
    table(tmp_path)
    (tmp_path / "v.jsonl").write_text('{"prompt": "a", "chosen": "0-0.png", "rejected": "0-1.png", "tie": true}\n')
    config = settings(
        tmp_path, model, "flow_dpo", rollout={"kind": "pairs", "file": str(tmp_path / "v.jsonl"), "prompts": 2},
        prompts={"heldout": None},
    )  # fmt: skip
    with pytest.raises(DataError, match="every pair is a tie"):
        train(config)
