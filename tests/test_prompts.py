"""Prompts from every kind of file: records, order, and messages that name the place and the remedy."""

from __future__ import annotations

import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from align.checking.check import check_files
from align.config import registry
from align.config.load import load_config
from align.data import choice, tables
from align.data.choice import Shares, indices_at, mixed_at
from align.data.prompts import PAIR, check_media, read_prompts, read_stored
from align.data.tables import Cell
from align.maths.seeds import derive
from alignflow.errors import ConfigError, DataError

needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="needs the extra 'data' (datasets)")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with two images in a folder."""
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    for name, value in (("a", 60), ("b", 200)):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(f"set/{name}.png")
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


# -- what a row becomes -----------------------------------------------------------------------------------------------

ROWS = {
    "jsonl": '{"prompt": " make it red ", "image": "a.png", "mask": null, "metadata": {"colour": "red"}, "n": 3}\n\n'
    '{"prompt": "a \u2028 line\\u2028", "image": "b.png", "mask": "a.png"}\n',
    "csv": 'n,prompt,image,mask,colour\n3," make it red ",a.png,,red\n,"a \u2028 line\u2028",b.png,a.png,\n',
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_text_media_and_metadata(here, kind):
    first, second = read_prompts(write(f"set/edits.{kind}", ROWS[kind]))
    assert first.text == "make it red"
    assert second.text.startswith("a \u2028 line")
    assert first.media == {"image": Path("set/a.png")}
    assert second.media == {"image": Path("set/b.png"), "mask": Path("set/a.png")}
    assert {key: str(value) for key, value in first.metadata.items()} == {"colour": "red", "n": "3"}
    assert second.metadata == {}
    assert first.place == f"set/edits.{kind} line {1 if kind == 'jsonl' else 2}"
    assert second.place == f"set/edits.{kind} line 3"


def test_cells_that_are_numbers_are_numbers(here):
    """As JSON would read them; what only looks like a number to some, and columns of text, stay text."""
    cells = {
        "1": 1,
        "-2.5": -2.5,
        "1e3": 1000.0,
        "0": 0,
        "007": "007",
        "+1": "+1",
        "1,5": "1,5",
        "nan": "nan",
        ".5": ".5",
    }
    text = "".join(f'{n},"{cell}",42\n' for n, cell in enumerate(cells))
    prompts_ = read_prompts(write("p.csv", f"prompt,reward,text\n{text}{len(cells)},{'9' * 5000},x\n"))
    found = [prompt.metadata["reward"] for prompt in prompts_]
    assert found == [*cells.values(), "9" * 5000]
    assert [type(value) for value in found[:4]] == [int, float, float, int]
    assert prompts_[0].metadata["text"] == "42"
    assert prompts_[0].text == "0"


def test_a_cell_may_hold_lines_and_quotes(here):
    text = 'prompt, n \n"a ""red"" cat, big\non a mat",1\n\n"b, c",2\n'
    first, second = read_prompts(write("p.csv", text))
    assert (first.text, first.place) == ('a "red" cat, big\non a mat', "p.csv line 2")
    assert (second.text, second.place, second.metadata) == ("b, c", "p.csv line 5", {"n": 2})


def test_paths_begin_at_home_where_they_say_so(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write("set/p.jsonl", '{"prompt": "x", "image": "~/set/a.png"}')
    assert read_prompts("~/set/p.jsonl")[0].media["image"] == here / "set/a.png"
    write("set/p.txt", "a")
    assert read_prompts("~/set/p.txt")[0].text == "a"
    with pytest.raises(DataError, match=r"~nobody-here/p.txt: ~nobody-here is not the home folder of a user"):
        read_prompts("~nobody-here/p.txt")


def test_paths_are_relative_to_the_table_or_absolute(here, monkeypatch):
    path = Path(write("set/edits.jsonl", json.dumps({"prompt": "x", "image": str(here / "set/b.png")}))).resolve()
    monkeypatch.chdir("/")
    assert read_prompts(str(path))[0].media["image"] == here / "set/b.png"


def test_a_text_file_is_a_prompt_a_line(here):
    prompts = read_prompts(write("p.txt", "\ufeffone\r\n\n  two\x85words \nthree"))
    assert [prompt.text for prompt in prompts] == ["one", "two\x85words", "three"]
    assert prompts[1].place == "p.txt line 3"


def test_order_and_beginning_are_stable(here):
    texts = [f"prompt {i}" for i in range(50)]
    files = [
        write("p.txt", "\n".join(texts)),
        write("p.jsonl", "\n".join(json.dumps({"prompt": text}) for text in texts)),
        write("p.csv", "\n".join(["prompt", *texts])),
    ]
    for name in files:
        assert [prompt.text for prompt in read_prompts(name)] == texts
        assert [prompt.text for prompt in read_prompts(name, 7)] == texts[:7]
    world = [prompt.text for prompt in read_prompts("shapes:heldout", 20, 3)]
    assert world == [prompt.text for prompt in read_prompts("shapes:heldout", 20, 3)]
    assert len(set(world)) > 10


@pytest.mark.parametrize("world", ["shapes", "shapes-edit", "shapes-fill", "shapes-video"])
def test_prompts_of_a_world_have_places_of_their_own(world):
    """A filter bans prompts by place."""
    some = read_prompts(f"{world}:train", 3)
    assert [prompt.place for prompt in some] == [f"{world}:train, prompt {n}" for n in range(3)]


def test_every_prompt_once_a_pass():
    seen = [index for step in range(5) for index in indices_at(step, 4, 10, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert indices_at(3, 4, 10, seed=1) == seen[12:16]


def test_the_order_of_a_pass_is_made_once(monkeypatch):
    """Against one shuffle a prompt, as it was; a step of a million prompts costs no shuffle but the pass's first."""

    def one_by_one(step, count, total, seed):
        places = [divmod(position, total) for position in range(step * count, (step + 1) * count)]
        return [
            int(np.random.default_rng(derive(seed, "epoch", epoch)).permutation(total)[offset])
            for epoch, offset in places
        ]

    for count, total in ((1, 1), (3, 7), (7, 3), (5, 5), (20, 6)):
        for step in range(6):
            assert indices_at(step, count, total, 3) == one_by_one(step, count, total, 3)
    choice._order.cache_clear()
    for step in range(50):
        indices_at(step, 48, 1_000_000, 0)
    assert choice._order.cache_info().misses == 1


def test_one_source_is_used_as_before():
    shares = Shares([[(0, 1.0)]], 4)
    assert [row for step in range(5) for _, row in mixed_at(step, shares, [10], 1)] == [
        row for step in range(5) for row in indices_at(step, 4, 10, 1)
    ]


def test_sources_give_prompts_in_proportion_to_their_weights():
    shares = Shares([[(0, 3.0)], [(0, 1.0)], [(0, 0.0)]], 6)
    given = [shares.at(step)[1] for step in range(8)]
    assert np.sum(given, 0).tolist() == [36, 12, 0]
    assert all(sum(row) == 6 and abs(row[0] - 4.5) < 1 for row in given)
    assert Shares([[(0, 3.0)], [(0, 1.0)], [(0, 0.0)]], 6).at(7) == shares.at(7)  # of the step alone
    chosen = [pair for step in range(8) for pair in mixed_at(step, shares, [5, 7, 9], seed=0)]
    for source, total in ((0, 5), (1, 7)):
        rows = [row for number, row in chosen if number == source]
        assert sorted(rows[:total]) == list(range(total))  # every prompt of a source once a pass


def test_a_curriculum_moves_from_one_source_to_the_next():
    shares = Shares([[(0, 1.0), (4, 0.0)], [(0, 0.0), (4, 1.0)]], 8)
    assert [shares.at(step)[1] for step in range(6)] == [[8, 0], [6, 2], [4, 4], [2, 6], [0, 8], [0, 8]]
    assert shares.at(5)[0] == [20, 20]


def test_sources_of_a_config(here):
    write("easy.txt", "a\nb\n")
    write("set/hard.txt", "c\nd\n")
    base = "generator: {path: shapes}\nreward: {kind: shapes}\nrecipe: nft\n"
    sources = "[{file: easy.txt, weight: 2}, {file: hard.txt, weight: [[0, 0], [9, 1]]}]"
    config = load_config(write("set/run.yaml", f"{base}prompts: {{train: {sources}}}\n"))
    assert [source.file for source in config.prompts.sources] == ["easy.txt", "set/hard.txt"]
    with pytest.raises(ConfigError, match=r"prompts.train: .*gone.txt"):
        check_files(load_config(write("gone.yaml", f"{base}prompts: {{train: [{{file: gone.txt}}]}}\n")))
    for bad, message in (
        ("train: [{file: easy.txt, weight: 0}]", "prompts.train.*no source has a weight at rollout 0"),
        (
            "train: [{file: easy.txt, weight: [[4, 1], [2, 1]]}]",
            "prompts.train.0.weight.*rollout 2 should stand before",
        ),
        ("train: [{file: easy.txt, weight: -1}]", "prompts.train"),
        ("train: []", "prompts.train"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(write("bad.yaml", f"{base}prompts: {{{bad}}}\n"))


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.csv", "caption,image\na cat,a.png\n", 'p.csv line 2: needs a text under "prompt"; it has caption, image: '),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', 'p.jsonl line 2: needs a text under "prompt"; it has text: '),
        ("p.jsonl", "{}", "it has nothing"),
        ("p.jsonl", '{"prompt": 3}', 'line 1: needs a text under "prompt"; it is 3 there'),
        ("p.jsonl", '{"prompt": " "}', 'line 1: needs a text under "prompt"; it is empty there'),
        ("p.jsonl", '{"prompt": "a", "n": 1, "n": 2}', 'line 1: "n" appears twice'),
        ("p.jsonl", '{"prompt": "a", "n": 1, "metadata": {"n": 2}}', '"n" is both beside "metadata" and in it'),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "\\uD83D cat"}', "line 2: \\ud83d is half of a character"),
        ("p.jsonl", '{"prompt": "a", "n": {"m": ["\\udc00"]}}', "line 1: \\udc00 is half of a character"),
        ("p.jsonl", '{"prompt": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1: nested too deeply"),
        ("p.jsonl", '{"prompt": "a", "n": ' + "9" * 5000 + "}", "line 1: Exceeds the limit"),
        ("p.jsonl", '{"prompt": "a", "image": "' + "x" * 5000 + '.png"}', "line 1: no image set/xxx"),
        ("p.jsonl", '{"prompt": "a", "image": "' + "x/" * 3000 + '.png"}', "line 1: no image set/x/x"),
        ("p.jsonl", '{"prompt": "a", "image": "a\\u0000.png"}', "line 1: no image set/a?.png"),
        ("p.jsonl", '{"prompt": "a", "image": "~nobody-here/a.png"}', "~nobody-here is not the home folder of a user"),
        ("p.jsonl", '{"\\u001b[31mcaption": "a"}', "it has caption: call"),
        ("p.csv", "prompt,image\na\n", "p.csv line 2: 1 cells, and the header has 2 columns"),
        ("p.csv", "prompt, tag,tag \na,b,c\n", 'p.csv line 1: the header has "tag" 2 times'),
        ("p.csv", ",prompt\n0,a\n", "p.csv line 1: column 1 of the header has no name"),
        ("p.csv", 'prompt,n\n"a" cat,1\n', "p.csv line 2: not CSV"),
        ("p.csv", 'prompt,n\na,1\n"a cat,2\nb,3\n', "p.csv line 3: not CSV (unexpected end of data)"),
        ("p.csv", 'prompt,image\n"a,a.png\nb,b.png\nc",a.png\n', "line 2: not CSV (a quote that closes 2 lines"),
        ("p.csv", 'prompt,n\na, "1"\n', "p.csv line 2: not CSV (a space before a quote"),
        ("p.jsonl", '{"prompt": "a"', "p.jsonl line 1: not JSON (Expecting"),
        ("p.jsonl", '["a"]', "p.jsonl line 1: expected an object"),
        ("p.jsonl", '{"prompt": "a", "image": "c.png"}', 'line 1: no image set/c.png; "image" is a path relative to '),
        ("p.jsonl", '{"prompt": "a", "mask": 3}', 'line 1: "mask" should be a file name, given 3'),
        ("p.csv", 'prompt,image\n"a,b",a.png\na, b,a.png\n', "p.csv line 3: more cells than the header has columns"),
        ("p.csv", 'prompt\n"' + "x" * 140_000 + '"\n', "p.csv line 2: not CSV (field larger than"),
        ("p.csv", "prompt\n", "p.csv holds no prompts"),
        ("p.txt", "\n \n", "p.txt holds no prompts"),
        ("p.json", "[]", "p.json ends in '.json'; tables are read from .jsonl, .csv, .parquet and hub:"),
    ],
)
def test_bad_tables_say_where_and_what(here, name, text, says):
    with pytest.raises(DataError) as caught:
        read_prompts(write(f"set/{name}", text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.csv", "gone.parquet"])
def test_missing_files(here, name):
    with pytest.raises(DataError, match=rf"file {name} does not exist \(looked in "):
        read_prompts(name)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_files_that_are_no_text(here, name):
    Path(name).write_bytes((b'{"prompt": "a"}' if name == "p.jsonl" else b"prompt") + b"\n\xff\xfe\x00")
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 text \(invalid start byte in line 2\)"):
        read_prompts(name)


def test_a_missing_mask_names_the_row(here):
    prompts = read_prompts(write("set/p.jsonl", '{"prompt": "a", "image": "a.png"}'))
    check_media(prompts, ["image", "metadata"], "the model")
    with pytest.raises(DataError, match=r"set/p.jsonl line 1: FluxFill needs 'mask' with every prompt; name a file"):
        check_media(prompts, ["image", "mask"], "FluxFill")


def test_pairs_need_both_files(here):
    rows = [{"prompt": "x", "chosen": "a.png", "rejected": "b.png", "image": "b.png", "judge": "me"}]
    pair = read_stored(write("set/p.jsonl", json.dumps(rows[0])), PAIR)[0]
    assert {name: path.name for name, path in pair.media.items()} == {
        "chosen": "a.png", "rejected": "b.png", "image": "b.png",
    }  # fmt: skip
    assert pair.metadata == {"judge": "me"}
    with pytest.raises(DataError, match=r'p.csv line 2: needs a file under "rejected"'):
        read_stored(write("set/p.csv", "prompt,chosen,rejected\nx,a.png,\n"), PAIR)
    with pytest.raises(DataError, match="holds no rows: each has prompt, chosen, rejected"):
        read_stored(write("set/empty.jsonl", "\n"), PAIR)


# -- datasets ---------------------------------------------------------------------------------------------------------


class Table:
    """As much of a dataset as is used: columns of values, each with a feature."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def select_columns(self, names):
        return Table({name: self.columns[name] for name in names}, {name: self.features[name] for name in names})

    def remove_columns(self, names):
        return self.select_columns([name for name in self.columns if name not in names])

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.columns.items()}

    def __iter__(self):
        return (self[row] for row in range(len(next(iter(self.columns.values())))))


def test_images_stay_in_the_dataset_until_asked_for(monkeypatch):
    cells = [{"bytes": b"one", "path": "x.png"}, {"bytes": None, "path": "/y.png"}, None]
    features = {"prompt": "text", "image": {"bytes": 0, "path": 0}, "mask": SimpleNamespace(dtype="binary"), "n": "int"}
    columns = {"prompt": ["a", "b", "c"], "image": cells, "mask": [b"m"] * 3, "n": [1, None, 3]}
    asked = []

    def load(source, name, split, **options):
        asked.append((name, split))
        return Table(columns, features)

    monkeypatch.setattr(tables, "_load", load)
    prompts = read_prompts("hub:owner/name:test", 3)
    assert asked == [("owner/name", "test")]
    assert [prompt.place for prompt in prompts] == [f"hub:owner/name:test row {i}" for i in (1, 2, 3)]
    assert [prompt.metadata for prompt in prompts] == [{"n": 1}, {}, {"n": 3}]
    images = [prompt.media["image"] for prompt in prompts]
    assert all(isinstance(image, Cell) for image in images)
    assert [image.content() for image in images] == [b"one", Path("/y.png"), None]
    assert prompts[2].media["mask"].content() == b"m"
    read_prompts("hub:owner/name")
    assert asked[-1] == ("owner/name", "train")


def test_a_dataset_without_the_package_says_what_to_install(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    Path("p.parquet").write_bytes(b"PAR1")
    for source in ("p.parquet", "hub:owner/name"):
        with pytest.raises(DataError, match=rf"{source} needs the package datasets, .*: pip install 'datasets==5.2.0'"):
            read_prompts(source)
    with pytest.raises(DataError, match="a dataset reads hub:owner/name"):
        read_prompts("hub:")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Datasets keeps what it prepares in a folder of this test."""
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data' (datasets)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


def as_bytes(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@needs_datasets
def test_parquet_with_images_inside(here, cache):
    rows = {"prompt": ["a", "b"], "n": [1, 2], "image": [{"bytes": as_bytes(v), "path": None} for v in (60, 200)]}
    features = cache.Features({"prompt": cache.Value("string"), "n": cache.Value("int64"), "image": cache.Image()})
    cache.Dataset.from_dict(rows, features=features).to_parquet("set/p.parquet")
    prompts = read_prompts("set/p.parquet")
    assert [(prompt.text, prompt.metadata) for prompt in prompts] == [("a", {"n": 1}), ("b", {"n": 2})]
    found = [np.asarray(Image.open(io.BytesIO(prompt.media["image"].content())))[0, 0, 0] for prompt in prompts]
    assert found == [60, 200]


@needs_datasets
def test_parquet_in_a_folder_with_a_pattern_for_a_name(here, cache, monkeypatch):
    folder = here / "set [1]*?"
    folder.mkdir()
    (folder / "a.png").write_bytes(as_bytes(60))
    image = {"bytes": cache.Value("binary"), "path": cache.Value("string")}
    features = cache.Features({"prompt": cache.Value("string"), "image": image})
    rows = {"prompt": ["a"], "image": [{"bytes": None, "path": "a.png"}]}
    cache.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "p[0].parquet"))
    (prompt,) = read_prompts("set [1]*?/p[0].parquet")
    assert prompt.media["image"].content() == Path("set [1]*?/a.png")


@needs_datasets
def test_parquet_with_paths_and_a_damaged_one(here, cache):
    cache.Dataset.from_dict({"prompt": ["a"], "image": ["a.png"]}).to_parquet("set/p.parquet")
    assert read_prompts("set/p.parquet")[0].media == {"image": Path("set/a.png")}
    Path("set/q.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"set/q.parquet: split 'train' cannot be loaded: "):
        read_prompts("set/q.parquet")
    cache.Dataset.from_dict({"caption": ["a"]}).to_parquet("set/r.parquet")
    with pytest.raises(DataError, match=r'set/r.parquet row 1: needs a text under "prompt"; it has caption'):
        read_prompts("set/r.parquet")


@needs_datasets
def test_folders_as_datasets(here, cache):
    write("set/train.jsonl", '{"prompt": "a"}\n{"prompt": "b"}')
    write("set/test.jsonl", '{"prompt": "c"}')
    for name in ("a.png", "b.png"):
        Path("set", name).unlink()
    assert [prompt.text for prompt in read_prompts("hub:./set")] == ["a", "b"]
    assert [prompt.text for prompt in read_prompts("hub:./set:test")] == ["c"]
    with pytest.raises(DataError, match=r"hub:./set:gone: split 'gone' cannot be loaded: .*gone"):
        read_prompts("hub:./set:gone")
    with pytest.raises(DataError, match=r"hub:\./nowhere: split 'train' cannot be loaded"):
        read_prompts("hub:./nowhere")
    cache.DatasetDict({"val": cache.Dataset.from_dict({"prompt": ["d"]})}).save_to_disk("saved")
    assert [prompt.text for prompt in read_prompts("hub:./saved:val")] == ["d"]
    cache.Dataset.from_dict({"prompt": ["e"]}).save_to_disk("alone")
    assert [prompt.text for prompt in read_prompts("hub:./alone")] == ["e"]


@needs_datasets
def test_a_folder_of_images_as_dataset(here, cache):
    write("set/metadata.csv", "file_name,prompt\na.png,make it blue\nb.png,make it green\n")
    prompts = read_prompts("hub:./set")
    assert [prompt.text for prompt in prompts] == ["make it blue", "make it green"]
    assert [prompt.media["image"].content().name for prompt in prompts] == ["a.png", "b.png"]


# -- check ------------------------------------------------------------------------------------------------------------


def test_what_adapters_ask_for_is_known_without_loading_them():
    from generators import kinds
    from generators.load import adapter

    assert {kind: registry.inputs(kind) for kind in kinds()} == {kind: adapter(kind).inputs for kind in kinds()}
    assert registry.inputs("somewhere.else:Fill") == ()


def test_check_reads_tables_and_leaves_the_hub_alone(here, monkeypatch):
    from align.checking import check
    from align.data import tables

    write("set/p.jsonl", '{"prompt": "a", "image": "gone.png"}')
    text = "generator: {path: owner/name}\nrecipe: nft\nreward: {kind: clip}\nprompts: {train: %s}\n"
    with pytest.raises(ConfigError, match=r"prompts.train: set/p.jsonl line 1: no image set/gone.png"):
        check.check_files(load_config(write("run.yaml", text % "set/p.jsonl")))
    write("set/p.jsonl", '{"prompt": "a", "image": "a.png"}')
    fill = ["generator.kind=flux_fill", "prompts.heldout=shapes:heldout"]
    with pytest.raises(ConfigError) as caught:
        check.check_files(load_config("run.yaml", fill))
    for says in (
        "train: set/p.jsonl line 1: generator flux_fill needs 'mask'",
        "heldout: shapes:heldout, prompt 0: generator flux_",
    ):
        assert f"  prompts.{says}" in str(caught.value)
    config = load_config(write("run.yaml", text % '"hub:owner/name"'), ["samples.video=mp4"])
    for module in (check, tables):
        monkeypatch.setattr(module, "find_spec", lambda name: object())
    check.check_files(config)
    for module in (check, tables):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check.check_files(config)
    assert "prompts.train: hub:owner/name needs the package datasets" in str(caught.value)
    assert "samples.video: mp4 needs a codec: pip install imageio-ffmpeg, or av" in str(caught.value)
