"""Scoring image files from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import written
from PIL import Image

run = written.run
ROOT = Path(__file__).parent.parent


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Two grey pictures in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.png", 64), ("b.png", 32)):
        Image.fromarray(np.full((size, size, 3), 128, np.uint8)).save(name)
    return ["a.png", "b.png"]


REWARD = "tests.test_score:brightness"


def brightness(media, prompts):
    """Mean of the picture."""
    return media.mean(dim=(1, 2, 3))


def test_score_prints_a_table_or_json(run, pictures, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    code, out, _ = run("score", *pictures, "--prompt", "grey", "--reward", REWARD)
    assert code == 0
    assert out.splitlines()[0].split() == ["file", REWARD]
    code, out, _ = run("score", *pictures, "--prompt", "a", "--prompt", "b", "--reward", REWARD, "--json")
    rows = json.loads(out)
    assert [(row["file"], row["prompt"]) for row in rows] == [("a.png", "a"), ("b.png", "b")]
    assert rows[0]["scores"][REWARD] == pytest.approx(128 / 255)


def test_score_refuses_bad_images_and_counts(run, pictures):
    Path("broken.png").write_text("not a picture")
    for arguments, says in (
        (["gone.png", "--prompt", "a"], "no image gone.png"),
        (["broken.png", "--prompt", "a"], "broken.png is not an image"),
        (["a.png", "b.png", "a.png", "--prompt", "a", "--prompt", "b"], "3 files and 2 prompts"),
        (["a.png"], "1 files and 0 prompts"),
    ):
        code, _, err = run("score", *arguments, "--reward", "shapes")
        assert code == 2
        assert says in err
