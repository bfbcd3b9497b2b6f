"""Scoring image files from the command line."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import written
from PIL import Image
from pyarrow import parquet
from tiny_run import settings

from align.data.media import encode
from align.data.prompts import Prompt
from align.evaluation.evaluate import sample_to_folder

run = written.run
ROOT = Path(__file__).parent.parent


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Two grey images in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.png", 64), ("b.png", 32)):
        Image.fromarray(np.full((size, size, 3), 128, np.uint8)).save(name)
    return ["a.png", "b.png"]


REWARD = "tests.test_score:brightness"


def brightness(media, prompts):
    """Mean of the image."""
    return media.mean(dim=(1, 2, 3))


def test_score_prints_a_table_or_json(run, images, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    code, out, _ = run("score", *images, "--prompt", "grey", "--reward", REWARD)
    assert code == 0
    assert out.splitlines()[0].split() == ["file", REWARD]
    code, out, _ = run("score", *images, "--prompt", "a", "--prompt", "b", "--reward", REWARD, "--json")
    rows = json.loads(out)
    assert [(row["file"], row["prompt"]) for row in rows] == [("a.png", "a"), ("b.png", "b")]
    assert rows[0]["scores"][REWARD] == pytest.approx(128 / 255)


def test_score_refuses_bad_images_and_counts(run, images):
    Path("broken.png").write_text("not an image")
    for arguments, says in (
        (["gone.png", "--prompt", "a"], "no image gone.png"),
        (["broken.png", "--prompt", "a"], "broken.png is not an image"),
        (["a.png", "b.png", "a.png", "--prompt", "a", "--prompt", "b"], "3 files and 2 prompts"),
        (["a.png"], "1 files and 0 prompts"),
    ):
        code, _, err = run("score", *arguments, "--reward", "shapes")
        assert code == 2
        assert says in err


def contrast(media, prompts, group):
    """How far each image is from the mean of its prompt."""
    values = media.mean(dim=(1, 2, 3))
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    index = torch.tensor([numbers[prompt] for prompt in prompts])
    return torch.stack([value - values[index == i].mean() for value, i in zip(values, index, strict=True)])


GROUPED = "{kind: mixture, parts: {bright: {reward: 'tests.test_score:brightness', normalise: group}}}"


@pytest.fixture
def levels(tmp_path, monkeypatch):
    """Images of brightness 0, 51, ..., 204 of 255 in a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    Path("many").mkdir()
    for level in range(5):
        Image.fromarray(np.full((16, 16, 3), 51 * level, np.uint8)).save(f"many/{level}.png")
    return Path("many")


def scored(out):
    return {Path(row["file"]).name: row["scores"] for row in json.loads(out)}


def test_samples_of_one_prompt_are_scored_together(run, levels):
    prompts = [word for prompt in "aabbb" for word in ("--prompt", prompt)]
    given = ("--reward", f"mix={GROUPED}", "--reward", "far=tests.test_score:contrast")
    code, out, _ = run("score", "many", *prompts, *given, "--json")
    assert code == 0
    found = scored(out)
    assert [found[f"{i}.png"]["mix"] for i in range(5)] == pytest.approx([-1, 1, -(1.5**0.5), 0, 1.5**0.5], abs=1e-4)
    assert [found[f"{i}.png"]["far"] for i in range(5)] == pytest.approx([-0.1, 0.1, -0.2, 0, 0.2], abs=1e-6)
    assert json.loads(out)[1]["parts"]["mix"] == {"bright": pytest.approx(0.2)}


def test_a_comparison_with_nothing_is_told_in_words(run, levels):
    code, out, err = run("score", "many/1.png", "--prompt", "a", "--reward", f"mix={GROUPED}", "--json")
    assert code == 1
    (row,) = json.loads(out)
    assert row["scores"]["mix"] is None
    assert row["parts"]["mix"]["bright"] == pytest.approx(0.2)
    assert "mixture compares the samples of a prompt with one another, and there is only this one" in err
    Image.new("RGB", (8, 8)).save("many/small.png")
    _, _, err = run("score", "many", "--prompt", "a", "--reward", f"mix={GROUPED}")
    assert "must be of one size; they are 16 x 16, 8 x 8" in err


def test_a_bad_file_is_a_bad_row(run, levels):
    (levels / "2.png").write_bytes(b"no image")
    code, out, err = run("score", "many", "gone.png", "--prompt", "a", "--reward", f"light={REWARD}", "--json")
    assert code == 2
    found = scored(out)
    assert found["gone.png"]["light"] is found["2.png"]["light"] is None
    assert [found[f"{i}.png"]["light"] for i in (0, 1, 3, 4)] == pytest.approx([0, 0.2, 0.6, 0.8])
    assert "2 of 6 files could not be read" in err


@pytest.mark.parametrize("name", ["scores.csv", "scores.jsonl", "scores.json"])
def test_scores_are_written_meanwhile_and_gone_on_with(name, run, levels):
    asked = ("--prompt", "a", "--reward", f"light={REWARD}", "--out", name, "--chunk", "2")
    assert run("score", "many/0.png", "many/1.png", *asked)[0] == 0
    first = Path(name).read_text()
    if name != "scores.json":
        with Path(name).open("a") as file:
            file.write('many/2.png,"cut' if name.endswith("csv") else '{"file": "many/2')  # as a kill leaves it
    code, out, err = run("score", "many", *asked)
    assert code == 0
    assert "3 rows added" in out
    assert "2 rows are there already" in err
    text = Path(name).read_text()
    assert text.startswith(first[:40])
    rows = {"csv": lambda: text.splitlines()[1:], "jsonl": text.splitlines, "json": lambda: json.loads(text)}
    assert len(rows[name.split(".")[1]]()) == 5
    assert run("score", "many", *asked)[1].splitlines()[-1] == f"0 rows added to {name}"
    code, _, err = run("score", "many", "--prompt", "a", "--reward", f"other={REWARD}", "--out", name)
    assert code == 2
    assert "choose another file" in err
    assert Path(name).read_text() == text


def test_scores_as_parquet_are_gone_on_with(run, levels):
    asked = ("--prompt", "a", "--reward", f"light={REWARD}", "--out", "scores.parquet", "--chunk", "2")
    assert run("score", "many/0.png", "many/1.png", *asked)[0] == 0
    code, out, err = run("score", "many", "gone.png", *asked)
    assert (code, "4 rows added" in out, "2 rows are there already" in err) == (2, True, True)
    table = parquet.read_table("scores.parquet")
    assert table.column_names == ["file", "prompt", "light", "reasons"]
    assert table["light"].to_pylist()[:5] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert table["light"].to_pylist()[5:] == [None]
    assert "no image gone.png" in table["reasons"].to_pylist()[5]
    code, _, err = run("score", "many", "--prompt", "a", "--reward", f"other={REWARD}", "--out", "scores.parquet")
    assert code == 2
    assert "has the columns file, prompt, light, reasons, not file, prompt, other, reasons" in err
    Path("scores.parquet").write_bytes(b"PAR1 cut")
    code, _, err = run("score", "many", *asked)
    assert code == 2
    assert "is not a file of scores" in err
    assert Path("scores.parquet").read_bytes() == b"PAR1 cut"


LATE, BRIGHT = ("{reward: 'tests.test_score:" + name + "', weight: " for name in ("late", "brightness"))
MIX = f"{{kind: mixture, parts: {{a: {LATE}2.0}}, b: {BRIGHT}1.0}}}}}}"


def late(media, prompts):
    """Scores of dark images are missing."""
    values = brightness(media, prompts)
    return values.masked_fill(values < 0.1, torch.nan)


def two(media, prompts):
    """A score with two parts, one of them missing for dark images."""
    from rewards.base import Scores

    values = brightness(media, prompts)
    return Scores(values, parts={"deep": 10 * values, "high": values.masked_fill(values < 0.3, torch.nan)})


def written_rows(name):
    """Rows of a CSV or parquet file, numbers as numbers and empty cells as None."""
    if name.endswith("parquet"):
        return parquet.read_table(name).to_pylist()
    rows = list(csv.DictReader(Path(name).read_text().splitlines()))
    text = ("file", "prompt", "reasons")
    return [{key: one if key in text else float(one) if one else None for key, one in row.items()} for row in rows]


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_parts_of_scores_are_columns(name, run, levels):
    given = (
        "--reward",
        "plain=tests.test_score:brightness",
        "--reward",
        f"mix={MIX}",
        "--reward",
        "two=tests.test_score:two",
    )
    asked = ("--prompt", "a", *given, "--out", name, "--chunk", "1")
    (levels / "00.png").write_bytes(b"no image")  # the first row has no parts at all
    code, out, _ = run("score", "many/00.png", "many/1.png", *asked)
    assert code == 2
    columns = ["file", "prompt", "plain", "mix", "two", "mix/a", "mix/b", "two/deep", "two/high", "reasons"]
    rows = written_rows(name)
    assert list(rows[0]) == columns
    assert [rows[0][key] for key in columns[2:-1]] == [None] * 7
    assert [rows[1][key] for key in columns[2:-1]] == pytest.approx([0.2, 0.6, 0.2, 0.2, 0.2, 2, None], abs=1e-6)
    assert [line.split()[:3] for line in out.splitlines()[1:-1]] == [
        ["plain", "0.2", "1"], ["mix", "0.6", "1"], ["two", "0.2", "1"], ["mix/a", "0.2", "1"],
        ["mix/b", "0.2", "1"], ["two/deep", "2", "1"], ["two/high", "-", "0"],
    ]  # fmt: skip
    assert run("score", "many", *asked)[0] == 0
    rows = written_rows(name)
    assert [list(row) == columns for row in rows] == [True] * 6
    assert {row["file"][-5:]: row["two/high"] for row in rows} == pytest.approx(
        {"0.png": None, "1.png": None, "2.png": 0.4, "3.png": 0.6, "4.png": 0.8} | {"0.png": None}, abs=1e-6
    )
    dark = next(row for row in rows if row["file"] == "many/0.png")
    assert (dark["mix"], dark["mix/a"], dark["mix/b"], dark["two/deep"]) == (None, None, 0.0, 0.0)


def test_a_file_without_the_columns_of_parts_is_continued(run, levels):
    Path("scores.csv").write_text('file,prompt,two,reasons\nold.png,"a, b",0.5,\n')
    asked = ("--prompt", "a", "--reward", "two=tests.test_score:two", "--out", "scores.csv")
    assert run("score", "many/4.png", *asked)[0] == 0
    first, second = written_rows("scores.csv")
    assert first == {"file": "old.png", "prompt": "a, b", "two": 0.5, "two/deep": None, "two/high": None, "reasons": ""}
    assert second["two/deep"] == pytest.approx(8)
    code, _, err = run(
        "score", "many/4.png", "--prompt", "a", "--reward", "deep=tests.test_score:two", "--out", "scores.csv"
    )
    assert code == 2
    assert "has the columns file, prompt, two, two/deep, two/high, reasons, not file, prompt, deep, reasons" in err


def test_parts_of_scores_in_json(run, levels):
    given = ("--prompt", "a", "--reward", "two=tests.test_score:two", "--out", "scores.jsonl")
    assert run("score", "many/2.png", *given)[0] == 0
    assert json.loads(Path("scores.jsonl").read_text())["parts"] == {
        "two": {"deep": pytest.approx(4), "high": pytest.approx(0.4)}
    }


def test_parquet_needs_its_package(run, levels, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = run("score", "many", "--prompt", "a", "--reward", f"light={REWARD}", "--out", "scores.parquet")
    assert code == 2
    assert "--out scores.parquet needs the package datasets" in err
    assert "pip install" in err


def test_an_output_that_is_something_else_is_kept(run, levels):
    for name, text in (("notes.csv", "a,b\n1,2\n"), ("notes.json", "[1]"), ("notes.jsonl", "{}\n"), ("notes.txt", "x")):
        Path(name).write_text(text)
        code, _, err = run("score", "many", "--prompt", "a", "--reward", f"light={REWARD}", "--out", name)
        assert code == 2, err
        assert Path(name).read_text() == text


def test_tables_bring_their_prompts(run, levels):
    rows = [{"prompt": "a", "image": "many/1.png"}, {"prompt": "b", "image": "many/gone.png"}, {"image": "many/2.png"}]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run("score", "t.jsonl", "--reward", f"light={REWARD}", "--json")
    assert code == 2
    assert [row["scores"]["light"] for row in json.loads(out)] == [pytest.approx(0.2), None, None]
    assert "t.jsonl line 2: no image" in err
    code, _, err = run("score", "t.jsonl", "--prompt", "a", "--reward", REWARD)
    assert code == 2
    assert "has its prompts in the column prompt" in err


def test_sample_folders_bring_their_prompts_and_no_contact_sheet(run, levels):
    from align.data.grids import save_samples

    clip = np.full((3, 16, 16, 3), 102, np.uint8)
    save_samples(Path("ours"), [np.full((16, 16, 3), 51, np.uint8), clip], ["a", "b"], [0, 1])
    code, out, err = run("score", "ours", "--reward", "light=tests.test_score:prompted", "--json")
    assert code == 0, err
    assert [(row["file"], row["prompt"]) for row in json.loads(out)] == [("ours/000.png", "a"), ("ours/001.webp", "b")]
    assert "skipped" in err
    code, out, err = run("score", "ours/000.png", "ours/grid.png", "--prompt", "x", "--reward", f"l={REWARD}", "--json")
    assert code == 0
    assert [row["file"] for row in json.loads(out)] == ["ours/000.png"]
    assert "ours/grid.png is the contact sheet of a sample folder; skipped" in err


def test_what_sample_writes_is_scored_and_paired_as_it_is(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [Prompt("a red circle"), Prompt("a blue square")]
    sample_to_folder(settings(tmp_path, model), Path("drawn"), prompts=asked, count=2)
    assert Path("drawn/sheet/grid.png").is_file()
    light = f"light={REWARD}"
    code, out, err = run("score", "drawn", "--reward", light, "--json")
    assert code == 0, err
    names = [f"drawn/{number:03d}.png" for number in range(4)]
    rows = [(row["file"], row["prompt"]) for row in json.loads(out)]
    assert rows == list(zip(names, ["a red circle"] * 2 + ["a blue square"] * 2, strict=True))
    _, out, _ = run("score", "drawn", "--prompt", "grey", "--reward", light, "--json")
    assert [row["file"] for row in json.loads(out)] == names
    code, out, err = run("pairs", "drawn", "--reward", light)
    assert code == 0, err
    assert "pairs    2" in out
    _, _, err = run("score", "drawn/sheet/grid.png", names[0], "--prompt", "x", "--reward", light)
    assert "drawn/sheet/grid.png is the contact sheet of a sample folder; skipped" in err


def prompted(media, prompts):
    """Mean of the sample, an image or a video."""
    return media.flatten(1).mean(1)


def test_columns_have_names(run, levels):
    settings = "{kind: 'tests.test_score:brightness'}"
    _, out, _ = run("score", "many/1.png", "--prompt", "a", "--reward", settings, "--reward", f"b={settings}")
    assert out.splitlines()[0].split() == ["file", "tests.test_score:brightness", "b"]
    code, _, err = run("score", "many/1.png", "--prompt", "a", "--reward", settings, "--reward", settings)
    assert code == 2
    assert "is taken; give it a name" in err
    code, _, err = run("score", "many/1.png", "--prompt", "a", "--reward", REWARD, "--device", "cuda:99")
    assert code == 2
    assert "--device: cuda:99 is not available" in err


def test_memory_does_not_grow_with_the_number_of_files(levels):
    """Pixels of no more than a batch are alive at a time."""
    from align.data.prompts import Prompt
    from align.evaluation.files import score_items
    from align.evaluation.score_items import Item
    from rewards.base import Reward

    most = 0

    def counts(media, prompts, group):
        nonlocal most
        most = max(most, len(media))
        return media.flatten(1).mean(1)

    alive = []
    items = (alive.append(i) or Item(str(i), levels / f"{i % 5}.png", Prompt("a")) for i in range(1000))
    rows = score_items(items, {"light": Reward("light", counts)}, chunk=8)
    for number, row in enumerate(rows):
        assert len(alive) <= number + 8
        assert row["scores"]["light"] == pytest.approx(0.2 * (number % 5))
    assert number == 999
    assert most == 8


def rate(media, prompts):
    """The frames a second that rewards are told."""
    from rewards.rate import fps_of

    return [fps_of(None)] * len(media)


def test_rewards_are_told_the_rate_of_a_file(run, images, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    clip = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    for name in ("a.mp4", "a.webp", "a.gif"):
        Path(name).write_bytes(encode(clip, Path(name).suffix, 30))
    files = ["a.mp4", "a.webp", "a.gif", "a.png"]
    code, out, _ = run("score", *files, "--prompt", "a", "--reward", "tests.test_score:rate", "--json")
    assert code == 0
    assert [next(iter(row["scores"].values())) for row in json.loads(out)] == pytest.approx([30, 30, 30, 16])
