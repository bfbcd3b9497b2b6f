"""Rewards around rewards: kept on disk, smoothed over neighbours, placed on a device."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
from pathlib import Path

import pytest
import torch
import written

import rewards
from rewards.base import RewardError
from rewards.digest import digest

run = written.run

MEDIA = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = list("aabbcc")
CODE = """
calls = []
def score(media, prompts, metadata):
    calls.append(len(media))
    values = media.mean(dim=(1, 2, 3)) + torch.tensor([float(m["bonus"]) for m in metadata])
    return values.masked_fill(media[:, 0, 0, 0] > 0.9, float("nan"))
"""


@pytest.fixture
def judge(tmp_path):
    """A callable that counts how many samples it was shown, and the inputs it wants."""
    file = tmp_path / "judge.py"
    file.write_text("import torch\n" + CODE)
    return {"kind": f"{file}:score"}, {"metadata": [{"bonus": i} for i in range(6)]}


def calls():
    import sys

    return sys.modules["alignflow_plugin_judge"].calls


def cached(judge, tmp_path, **options):
    return rewards.parse({"kind": "cached", "reward": judge, "folder": str(tmp_path / "kept"), **options}).build()


def test_a_score_is_asked_for_once(judge, tmp_path):
    settings, inputs = judge
    media = MEDIA.clone()
    media[:, 0, 0, 0] = 0.5
    media[4, 0, 0, 0] = 0.95  # has no score, so it is asked for again
    reward = cached(settings, tmp_path)
    first = reward(media[:5], PROMPTS[:5], None, {"metadata": inputs["metadata"][:5]})
    assert first.reasons == {4: "the reward returned nan"}
    second = reward(media, PROMPTS, None, inputs)
    assert calls() == [5, 2]
    assert torch.equal(second.values[:4], first.values[:4])
    assert second.values.isnan().tolist() == [False] * 4 + [True, False]
    reward(media[:1], ["another prompt"], None, {"metadata": inputs["metadata"][:1]})
    reward(media[:1], PROMPTS[:1], None, {"metadata": [{"bonus": 7}]})
    reward(media[:1] + 1e-7, PROMPTS[:1], None, {"metadata": inputs["metadata"][:1]})
    assert calls() == [5, 2, 1, 1, 1]


def test_kept_scores_outlive_the_process_but_not_the_reward(judge, tmp_path):
    settings, inputs = judge
    asked = (MEDIA, PROMPTS, None, inputs)
    first = cached(settings, tmp_path)(*asked)
    again = cached(settings, tmp_path)  # loads the module anew
    known = int(first.values.isfinite().sum())
    assert (
        torch.equal(
            again(*asked).values,
            first.values,
        )
        or first.values.isnan().any()
    )
    assert sum(calls()) == 6 - known
    cached(settings, tmp_path, version="2")(*asked)
    assert calls() == [6]
    file = tmp_path / "judge.py"
    file.write_text(file.read_text().replace("mean(", "sum("))
    changed = cached(settings, tmp_path)(*asked)
    assert calls() == [6]
    assert not torch.equal(changed.values, first.values)


def test_a_damaged_row_is_scored_again(judge, tmp_path):
    settings, inputs = judge
    reward = cached(settings, tmp_path)
    first = reward(MEDIA, PROMPTS, None, inputs)
    file = next((tmp_path / "kept").glob("*.sqlite"))
    with sqlite3.connect(file) as db:
        key, _ = db.execute("SELECT key, row FROM scores LIMIT 1").fetchone()
        db.execute("UPDATE scores SET row = ? WHERE key = ?", (json.dumps({"": 99.0}), key))
    second = reward(MEDIA, PROMPTS, None, inputs)
    assert torch.equal(second.values.nan_to_num(), first.values.nan_to_num())
    assert calls()[1] == 1 + int(first.values.isnan().sum())


@pytest.mark.parametrize("damage", [lambda data: b"x" * len(data), lambda data: data[: len(data) // 2]])
def test_a_damaged_file_is_put_aside(damage, judge, tmp_path):
    settings, inputs = judge
    first = cached(settings, tmp_path)(MEDIA, PROMPTS, None, inputs)
    file = next((tmp_path / "kept").glob("*.sqlite"))
    file.write_bytes(damage(file.read_bytes()))
    reward = cached(settings, tmp_path)
    for _ in range(2):
        again = reward(MEDIA, PROMPTS, None, inputs)
        assert torch.equal(again.values.nan_to_num(), first.values.nan_to_num())
    assert (tmp_path / "kept" / f"{file.stem}.damaged").exists()


def _write(path, start):
    from rewards.serving.score_store import ScoreStore

    store = ScoreStore(Path(path))
    for i in range(start, start + 10):
        store.write({str(i): {"": float(i)}})


def test_many_processes_write_at_once(tmp_path):
    path = tmp_path / "scores.sqlite"
    processes = [multiprocessing.get_context("fork").Process(target=_write, args=(path, 10 * n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    from rewards.serving.score_store import ScoreStore

    assert ScoreStore(path).read([str(i) for i in range(30)]) == {str(i): {"": float(i)} for i in range(30)}


def test_what_compares_samples_is_not_kept(tmp_path):
    part = {"reward": "shapes", "normalise": "group"}
    with pytest.raises(RewardError, match=r"compares samples of a group.*cache the rewards inside it"):
        cached({"kind": "mixture", "parts": {"a": part}}, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RewardError, match="choose another folder"):
        rewards.parse({"kind": "cached", "reward": "shapes", "folder": str(tmp_path / "file")}).build()


def test_alike_samples_score_alike(judge):
    settings, inputs = judge
    media = MEDIA.clone()
    media[1] = media[0]  # the same image for the same prompt; its bonus differs by 1
    media[3] = media[0]  # the same image for another prompt
    media[:, 0, 0, 0] = 0.5
    smooth = rewards.parse({"kind": "consistent", "reward": settings, "embed": "clip", "similarity": 0.999}).build()
    plain = rewards.parse(settings).build()(media, PROMPTS, None, inputs).values
    scores = smooth(media, PROMPTS, None, inputs)
    torch.testing.assert_close(scores.values[:2], plain[:2].mean().expand(2))
    assert torch.equal(scores.values[2:], plain[2:])
    assert torch.equal(scores.parts["unsmoothed"], plain)
    assert smooth.scope == "group"
    with pytest.raises(RewardError, match="has no embedding"):
        rewards.parse({"kind": "consistent", "reward": settings}).build()


def test_placed_in_a_precision_of_its_own():
    plain = rewards.parse("clip").build()
    placed = rewards.parse({"kind": "placed", "reward": "clip", "device": "cpu", "dtype": "bfloat16"}).build()
    exact, rough = (reward(MEDIA, ["a red circle"] * 6).values for reward in (plain, placed))
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.02, rtol=0)
    same = rewards.parse({"kind": "placed", "reward": "clip"}).build()(MEDIA, ["a red circle"] * 6).values
    assert torch.equal(exact, same)
    with pytest.raises(RewardError, match="cuda:9 is not available on this machine"):
        rewards.parse({"kind": "placed", "reward": "shapes", "device": "cuda:9"}).build()
    with pytest.raises(ValueError, match="no such device 'gpu'"):
        rewards.parse({"kind": "placed", "reward": "shapes", "device": "gpu"}).build()


def test_calibrating_files(run, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for level in (0, 51, 255):
        Image.new("RGB", (16, 16), (level, level, level)).save(f"{level:03}.png")
    Path("dark.py").write_text("def score(media, prompts):\n    return 1 - media.mean(dim=(1, 2, 3))\n")
    files = sorted(map(str, Path().glob("*.png")))
    code, out, _ = run("reward", "calibrate", "{kind: 'dark.py:score'}", *files, "--prompt", "p", "--out", "dark.json")
    assert (code, out) == (0, "dark.json: mean 0.6, deviation 0.432 of 3 scores, 0 missing\n")
    found = json.loads(Path("dark.json").read_text())
    assert found["quantiles"][::50] == pytest.approx([0, 0.8, 1])
    part = {"reward": {"kind": "dark.py:score"}, "normalise": "quantile", "reference": "dark.json"}
    reward = rewards.parse({"kind": "mixture", "parts": {"dark": part}}).build()
    assert reward(torch.full((1, 3, 4, 4), 0.2), ["p"]).values.item() == pytest.approx(0.5)
    code, _, err = run("reward", "calibrate", "{kind: 'dark.py:score'}", files[0], "--prompt", "p")
    assert (code, err) == (1, "error: a reference sample needs scores that differ; it has 1 scores\n")


def test_a_digest_is_of_the_numbers_not_of_how_they_lie_in_memory():
    rows = torch.arange(6.0).view(3, 2)
    for column in (rows[:, 1], rows[:1, 1], rows.T, rows[0, 0]):
        assert digest(column) == digest(column.clone(memory_format=torch.contiguous_format))
    assert digest(rows[:1, 1]) != digest(rows[:1, 0])
