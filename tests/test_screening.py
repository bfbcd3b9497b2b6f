"""Bad rows are found before the first step, and whatever ends a run leaves its last whole step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_run
import torch
from launched import launch
from PIL import Image
from tiny_run import final_tensors, policy_gap, settings

from align.data import screening
from align.data.prompts import read_prompts
from align.data.screening import Needs, screen
from align.training.trainer import train
from alignflow.errors import DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.sd3_pipeline().save_pretrained(folder)
    return folder


class Editor:
    """As much of a generator as is asked: prompts of up to three words, with an image and a mask."""

    pipeline_class, size, inputs, options, frames = "Editor", (8, 8), ("image", "mask"), None, None

    def too_long(self, prompts):
        return {i: "the prompt has 4 tokens" for i, text in enumerate(prompts) if len(text.split()) > 3}


@pytest.fixture
def table(tmp_path):
    """Six rows, four of which cannot be used."""
    for name, side in (("a", 16), ("b", 24)):
        Image.fromarray(np.full((side, 16, 3), 90, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    rows = [
        {"prompt": "fine", "image": "a.png", "mask": "a.png"},
        {"prompt": "cut", "image": "cut.png", "mask": "a.png"},
        {"prompt": "two sizes", "image": "a.png", "mask": "b.png"},
        {"prompt": "no mask", "image": "a.png"},
        {"prompt": "much too many words", "image": "a.png", "mask": "a.png"},
        {"prompt": "fine too", "image": "b.png", "mask": "b.png"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "p.jsonl"


NEEDS = Needs(("image", "mask"))


def test_every_kind_of_bad_row_is_named(table):
    bad, reached = screen(read_prompts(str(table)), Editor(), NEEDS)
    assert reached == 6
    assert [place.rsplit(" ", 1)[1] for place in bad] == ["2", "3", "4", "5"]
    for said, words in zip(
        bad.values(), ("not an image", "must be of one size", "needs 'mask'", "4 tokens"), strict=True
    ):
        assert words in said
        assert said.startswith(f"{table} line ")


def test_what_was_read_is_kept_by_content(table, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(screening, "WORTH_KEEPING", 0.0)
    monkeypatch.setattr(screening, "CHUNK", 2)
    prompts, read = read_prompts(str(table)), []
    images_of = screening.images_of
    monkeypatch.setattr(screening, "images_of", lambda prompt, names: read.append(prompt) or images_of(prompt, names))
    first = screen(prompts, Editor(), NEEDS)
    seen = len(read)
    assert screen(prompts, Editor(), NEEDS) == first
    assert len(read) == seen > 0
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert len(screen(prompts, Editor(), NEEDS)[0]) == 3
    assert len(read) == 2 * seen


def test_time_is_bounded_and_the_next_start_goes_on(table, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(screening, "WORTH_KEEPING", 0.0)
    clock = iter(range(1000))
    monkeypatch.setattr(screening.time, "monotonic", lambda: next(clock))
    prompts, reached = read_prompts(str(table)), []
    for _ in range(4):
        bad, count = screen(prompts, Editor(), NEEDS, seconds=4)
        reached.append(count)
    assert reached == sorted(set(reached))[:4] or reached[-1] == 6
    assert 0 < reached[0] < 6
    assert len(bad) == sum(line <= reached[-1] for line in (2, 3, 4, 5))


def test_a_prompt_too_long_stops_or_is_left_out(model, tmp_path):
    prompts = tmp_path / "rows.jsonl"
    texts = ["a cat", "word " * 200, "a dog", "a tree", "a hat"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    given = {"train": str(prompts), "heldout": str(prompts)}
    with pytest.raises(DataError, match=r"1 of 5 rows cannot be used.*\n  .*rows.jsonl line 2: the prompt .* tokens"):
        train(settings(tmp_path, model, prompts=given))
    clean = tmp_path / "clean.jsonl"
    clean.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts if len(text) < 20))
    whole = settings(tmp_path, model, prompts={"train": str(clean), "heldout": str(clean)}, out=str(tmp_path / "whole"))
    train(whole)
    part = settings(tmp_path, model, prompts=given | {"bad": "skip"}, out=str(tmp_path / "part"), train={"steps": 1})
    train(part)
    skipped = json.loads((part.run_dir / "skipped.json").read_text())
    assert [list(found) for found in skipped.values()] == [[f"{prompts} line 2"]] * 2
    texts[1] = "a short one now"  # mended, but the run began without it
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    part = settings(tmp_path, model, prompts=given | {"bad": "skip"}, out=str(tmp_path / "part"))
    train(part, resume=True)
    assert policy_gap(final_tensors(whole), final_tensors(part)) == 0


def breaks(media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward that fails as no reward should, once a file says so."""
    from rewards.base import RewardError

    if Path("broken").exists():
        raise RewardError("the disk is gone")
    return tiny_run.redness(media, prompts)


def test_any_error_leaves_the_last_whole_step(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rare = {"checkpoint": {"every": 0}, "evaluate": {"every": 0, "at_start": False}}
    reward = {"kind": "test_screening:breaks"}
    whole = settings(tmp_path, model, reward=reward, out="whole", train={"steps": 4}, **rare)
    train(whole)
    part = settings(tmp_path, model, reward=reward, out="part", train={"steps": 4}, **rare)
    from align.training.trainer import Trainer

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, n: (Path("broken").touch() if n == 2 else None, step(self, n))[1])
    from rewards.base import RewardError

    with pytest.raises(RewardError, match="the disk is gone"):
        train(part)
    assert [path.name for path in (part.run_dir / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.setattr(Trainer, "step", step)
    Path("broken").unlink()
    train(part, resume=True)
    assert policy_gap(final_tensors(whole), final_tensors(part)) == 0


CODE = """
import sys
from pathlib import Path
import torch
from align.training.trainer import Trainer, train
from accelerate import PartialState
from tiny_run import settings
folder, model, broken = map(Path, sys.argv[1:])
if PartialState().process_index == 1:
    draw = Trainer.step
    def step(self, n):
        source = self.drawing.source
        if n == 1:
            def gone(*args):
                raise OSError("the share is gone")
            self.drawing.source = gone
        return draw(self, n)
    Trainer.step = step
try:
    train(settings(folder, model, checkpoint={"every": 0}, evaluate={"every": 0, "at_start": False}))
except Exception as error:
    print(f"{PartialState().process_index}: {type(error).__name__}: {error}", flush=True)
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_a_checkpoint(model, tmp_path):
    said = launch(2, tmp_path, CODE, str(tmp_path), str(model), "broken", timeout=120)
    assert "1: OSError: the share is gone" in said
    assert "0: TrainingError: another process stopped in this step" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
