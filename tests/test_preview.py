"""``alignflow data preview``: items, media, shares, rows that are left out with their reason; nothing more is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import written
from PIL import Image

from align.checking.check import bucket_sizes, seen_sizes
from align.checking.sizes import native_size
from align.config.load import load_config
from align.config.model import GeneratorConfig
from align.data import preview
from align.data.inputs import read_sample
from align.data.media import to_tensor
from align.data.prompts import read_table
from align.policy.build import build_generator
from align.rollout.sources import Share, StoredSource
from generators.settings import Memory

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
    assert "image: 64 x 64, from 200 x 300" in page
    assert "Media are shown as the model sees them, cropped about the middle and resized." in page
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


NO_REWARD = BASE.replace("flow_rwr", "flow_dpo").replace("reward: {kind: shapes}\n", "")
SIZED = NO_REWARD.replace("cpu}", "cpu, size: [64, 64]}")
PAIRS = f"{SIZED}prompts: {{train: pairs.jsonl}}\nrollout: {{kind: pairs, file: pairs.jsonl, prompts: 1"


def left_to_right(height, width):
    """Pixels whose red is their column and whose green is their row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 255 // (width - 1), rows * 255 // (height - 1), 0 * rows], -1).astype(np.uint8)


def test_media_are_those_that_the_network_gets(here):
    """The pixels of :class:`StoredSource`, also in buckets, where the rows of a bucket share its size."""
    shapes = {"wide": (40, 100), "tall": (150, 60), "square": (64, 64)}
    for name, (height, width) in shapes.items():
        Image.fromarray(left_to_right(height, width)).save(f"{name}.png")
        Image.fromarray(left_to_right(height, width)[::-1]).save(f"{name}-flipped.png")
    table("pairs.jsonl", [{"prompt": n, "chosen": f"{n}.png", "rejected": f"{n}-flipped.png"} for n in shapes])
    Path("mine.yaml").write_text(f"{PAIRS}, buckets: {{step: 8, ratio: 2}}}}\n")
    config = load_config("mine.yaml")
    sizes = seen_sizes(config)
    assert sizes == bucket_sizes(config)
    (found,) = preview.preview(config, 8, sizes)
    generator = build_generator(config.generator, config.memory, "cpu")
    source = StoredSource(config, generator, Share())
    assert len(found.items) == 3, found.dropped
    for number, item in enumerate(found.items):
        bucket = source.division.sizes[source.division.bucket[number]]
        assert item.size == bucket
        for name, pixels in item.media.items():
            expected = read_sample(item.prompt, name, bucket, None)
            assert torch.equal(to_tensor(pixels), expected)
    assert len({item.size for item in found.items}) == 3
    text = preview.page("mine", [found])
    assert "chosen: bucket 48 x 80, from 40 x 100" in text
    assert "chosen: bucket 64 x 64<" in text


def test_without_a_known_size_the_page_says_so(here):
    table("pairs.jsonl", [{"prompt": "a", "chosen": "a.png", "rejected": "b.png"}])
    Path("mine.yaml").write_text(PAIRS.replace(", size: [64, 64]", "").replace("path: shapes", "path: me/mine") + "}\n")
    config = load_config("mine.yaml")
    assert seen_sizes(config) == []
    (found,) = preview.preview(config, 8, [])
    text = preview.page("mine", [found])
    assert "chosen: 200 x 300<" in text
    assert "Set generator.size to see them cropped and resized" in text


def test_a_row_beyond_the_ratio_is_left_out_as_in_training(here):
    table("pairs.jsonl", [{"prompt": "a", "chosen": "a.png", "rejected": "b.png"}])
    Path("mine.yaml").write_text(f"{PAIRS}, buckets: {{step: 8, ratio: 1.2, beyond: stop}}}}\n")
    config = load_config("mine.yaml")
    (found,) = preview.preview(config, 8, seen_sizes(config))
    assert found.items == []
    assert "more than rollout.buckets.ratio 1.2" in next(iter(found.dropped.values()))


@pytest.mark.parametrize(
    ("kind", "path"), [("sd3", "shapes"), ("flux_kontext", "shapes-edit"), ("flux_fill", "shapes-fill")]
)
def test_the_default_size_is_that_of_the_loaded_model(kind, path):
    settings = GeneratorConfig(kind=kind, path=path, device="cpu")
    generator = build_generator(settings, Memory(), "cpu")
    assert native_size(settings) == generator.native_size()


def test_a_default_size_that_only_the_adapter_knows_is_not_guessed():
    assert native_size(GeneratorConfig(kind="wan", path="shapes-video", device="cpu")) is None
