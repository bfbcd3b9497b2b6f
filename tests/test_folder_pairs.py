"""``alignflow pairs --chosen A --rejected B``: two folders whose files have the same names."""

from __future__ import annotations

from pathlib import Path

import pytest
import written
from PIL import Image
from pyarrow import parquet

from align.data.prompts import PAIR, read_stored

run = written.run


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three better and three worse images, of which two have a partner; prompts beside the better ones."""
    monkeypatch.chdir(tmp_path)
    for side, names in (("good", ("a.png", "in/b.png", "c.png")), ("bad", ("a.jpg", "in/b.png", "d.png"))):
        for name in names:
            path = Path(side, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (200 if side == "good" else 20, 0, 0)).save(path)
            if side == "good":
                path.with_suffix(".txt").write_text(f"a red {path.stem}\n")
    return tmp_path


ASKED = ("pairs", "--chosen", "good", "--rejected", "bad")


def test_files_of_one_name_are_a_pair(run, folders: Path) -> None:
    code, out, _ = run(*ASKED, "--out", "made")
    assert code == 0
    assert "names without a partner  2 (c, d)" in out
    rows = read_stored("made/pairs.parquet", PAIR)
    assert [row.text for row in rows] == ["a red a", "a red b"]
    assert rows[0].media["chosen"] == folders / "good/a.png"
    assert rows[0].media["rejected"] == folders / "bad/a.jpg"
    table = parquet.read_table("made/pairs.parquet")
    assert {"prompt", "chosen", "rejected", "policy", "source"} <= set(table.column_names)
    before = Path("made/pairs.parquet").read_bytes()
    assert run(*ASKED, "--out", "made")[0] == 0
    assert Path("made/pairs.parquet").read_bytes() == before


def test_prompts_of_a_table_or_one_for_all(run, folders: Path) -> None:
    Path("table.csv").write_text("file,prompt\na.png,first\nin/b,second\n")
    assert run(*ASKED, "--prompts-file", "table.csv", "--copy", "--out", "made")[0] == 0
    rows = read_stored("made/pairs.parquet", PAIR)
    assert [row.text for row in rows] == ["first", "second"]
    assert rows[0].media["chosen"].is_relative_to("made")
    assert run(*ASKED, "--prompt", "red", "--out", "other")[0] == 0
    assert [row.text for row in read_stored("other/pairs.parquet", PAIR)] == ["red", "red"]


def test_what_is_wrong_is_said(run, folders: Path) -> None:
    Path("table.csv").write_text("file,prompt\na.png,first\n")
    Path("empty").mkdir()
    for words, says in (
        ((*ASKED, "--prompts-file", "table.csv"), "1 of 2 pairs have no prompt: in/b; add rows"),
        (("pairs", "--chosen", "good"), "give both --chosen and --rejected"),
        (("pairs",), "give a SOURCE, or --chosen and --rejected"),
        ((*ASKED, "--reward", "shapes"), "are pairs already: leave out SOURCE, --reward"),
        ((*ASKED, "--policy", "all"), "are pairs already"),
        (("pairs", "--chosen", "good", "--rejected", "empty"), "no images or videos in folder empty"),
        (("pairs", "--chosen", "gone", "--rejected", "bad"), "no folder gone"),
    ):
        code, _, err = run(*words)
        assert code == 2
        assert says in err
    Path("good/a.txt").unlink()
    assert "1 of 2 pairs have no prompt: a; write NAME.txt" in run(*ASKED)[2]
    assert not Path("pairs").exists()


def test_a_file_that_cannot_be_read_is_in_no_pair(run, folders: Path) -> None:
    Path("bad/a.jpg").write_text("no image")
    code, _, err = run(*ASKED, "--out", "made")
    assert code == 2
    assert "bad/a.jpg is not an image" in err
    assert "error: 1 file could not be read" in err
    assert [row.text for row in read_stored("made/pairs.parquet", PAIR)] == ["a red b"]
    Image.new("RGB", (16, 16)).save("good/a.webp")
    assert "have the same name; keep one of them" in run(*ASKED, "--out", "more")[2]
