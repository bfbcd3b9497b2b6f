"""``alignflow data preview``: items, media, shares, rows that are left out with their reason; nothing more is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import written
from PIL import Image

from align.config.load import load_config
from align.data import preview
from align.data.prompts import read_table

run = written.run
BASE = "generator: {kind: sd3, path: shapes, device: cpu}\nreward: {kind: shapes}\nrecipe: {kind: flow_rwr}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (300, 200), colour).save(name)
    Path("broken.png").write_bytes(b"no image")
    return tmp_path


def table(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_prompts_of_weighted_sources_with_rows_left_out(run, here):
    Path("one.txt").write_text("a cat\n<b>a dog</b>\na tree\n")
    table("two.jsonl", [{"text": "no prompt"}, {"prompt": "a hat", "image": "a.png", "tag": "hats"},
                        {"prompt": "lost", "image": "nowhere.png"}])  # fmt: skip
    sources = "[{file: one.txt, weight: 1}, {file: two.jsonl, weight: 3}]"
    Path("mine.yaml").write_text(f"{BASE}prompts: {{train: {sources}}}\n")
    code, out, _ = run("data", "preview", "mine.yaml", "--count", "2", "--out", "page.html")
    assert code == 0
    assert out.splitlines() == [
        "one.txt: 2 items, 25% of a rollout",
        "two.jsonl: 1 item, 75% of a rollout, 2 rows left out",
        "page.html",
    ]
    page = Path("page.html").read_text()
    assert "&lt;b&gt;a dog" in page
    assert "a tree" not in page
    assert "tag: hats" in page
    assert "300 x 200 image" in page
    assert page.count("<img src=") == 1
    assert "needs a text under" in page
    assert "nowhere.png" in page


def test_pairs_with_scores_ties_and_broken_files(here):
    row = {"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"}
    table("pairs.jsonl", [row, {**row, "tie": True}, {**row, "rejected": "broken.png"},
                          {**row, "chosen_score": 3, "rejected_score": 2}])  # fmt: skip
    Path("mine.yaml").write_text(
        BASE.replace("flow_rwr", "flow_dpo").replace("reward: {kind: shapes}\n", "")
        + "prompts: {train: pairs.jsonl}\nrollout: {kind: pairs, file: pairs.jsonl, prompts: 1}\n"
    )
    (found,) = preview.preview(load_config("mine.yaml"), 8)
    assert [item.notes for item in found.items] == [
        ["reward of chosen: 1", "reward of rejected: 0"],
        ["reward of chosen: 3", "reward of rejected: 2"],
    ]
    assert [sorted(item.media) for item in found.items] == [["chosen", "rejected"]] * 2
    assert len(found.dropped) == 2
    assert "a tie" in " ".join(found.dropped.values())
    assert "broken.png" in " ".join(found.dropped.values())


def test_reading_stops_after_the_items(here, monkeypatch):
    table("rows.jsonl", [{"prompt": f"number {n}", "chosen": "a.png", "rejected": "b.png"} for n in range(500)])
    Path("mine.yaml").write_text(
        BASE.replace("flow_rwr", "flow_dpo").replace("reward: {kind: shapes}\n", "")
        + "prompts: {train: rows.jsonl}\nrollout: {kind: pairs, file: rows.jsonl, prompts: 1}\n"
    )
    read = []
    monkeypatch.setattr(preview, "read_table", lambda *given: (read.append(row) or row for row in read_table(*given)))
    (found,) = preview.preview(load_config("mine.yaml"), 3)
    assert len(found.items) == len(read) == 3
