"""Tables that people and programs damage: read, or refused in words that name the line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from harness import failures
from PIL import Image

from align.data.pair_table import read_judged
from align.data.prompts import PAIR, read_prompts, read_stored
from alignflow.errors import DataError
from alignflow.text import printable

TOTAL, SEED = 500, 16
ROWS = [
    {
        "prompt": "a red circle, above",
        "image": "a.png",
        "chosen": "a.png",
        "rejected": "b.png",
        "reward": 0.5,
        "score": 1,
    },
    {"prompt": 'a "blue" square', "image": "b.png", "chosen": "b.png", "rejected": "a.png", "reward": -1, "score": 2},
    {
        "prompt": "zwei Kreise \U0001f600",
        "image": "a.png",
        "chosen": "a.png",
        "rejected": "b.png",
        "reward": 3e2,
        "score": 0,
    },
]
ODD = (
    "", " ", "\0", "\x1b[31m", "\ud800", "\u202e", "~", "~nobody/x", "../../../etc/passwd", "a" * 300, "x/" * 3000,
    "nan", "1e999", "9" * 5000, "-0", "true", "null", "[" * 3000, "{}", '"', '"a', 'a"b', ",", "\n", "\r", "\u2028",
    "/dev/zero", "/dev/null", "/", ".", "file:///a.png", "http://x/a.png", "hub:x/y", "con", "a.png\0", "%s%n",
    "{0}", "\ufeff",
)  # fmt: skip
ODD_JSON = (
    None,
    True,
    0,
    1.5,
    10**400,
    [],
    {},
    [1, [2]],
    {"path": "a.png"},
    {"bytes": "x"},
    {"metadata": {"prompt": 1}},
)


def as_csv(rows: list[dict[str, object]]) -> str:
    def cell(value: object) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n\r') else text

    return "\n".join([",".join(ROWS[0]), *(",".join(map(cell, row.values())) for row in rows)]) + "\n"


def as_jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_text(rows: list[dict[str, object]]) -> str:
    return "".join(f"{row['prompt']}\n" for row in rows)


WRITERS = {".csv": as_csv, ".jsonl": as_jsonl, ".txt": as_text}


def changed(suffix: str, rng: random.Random) -> bytes:
    """A table with a value, a name, or bytes of it changed."""
    rows = [dict(row) for row in ROWS]
    for _ in range(rng.choice([0, 1, 1, 2])):
        row, name = rng.choice(rows), rng.choice(list(ROWS[0]))
        row[name] = rng.choice(ODD_JSON) if suffix == ".jsonl" and rng.random() < 0.4 else rng.choice(ODD)
    if rng.random() < 0.2:
        row = rng.choice(rows)
        row[rng.choice(ODD)] = rng.choice(ODD)
    content = bytearray(WRITERS[suffix](rows).encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([0, 0, 1, 1, 3])):
        place = rng.randrange(len(content))
        kind = rng.randrange(5)
        if kind == 0:
            content[place] = rng.randrange(256)
        elif kind == 1:
            content[place:place] = rng.choice(
                [b'"', b",", b"\n", b"\r\n", b"\0", b"\xff", b"\\", b"\xef\xbb\xbf", b"{", b"\\ud800"]
            )
        elif kind == 2:
            del content[place : place + rng.randrange(1, 40)]
        elif kind == 3:
            del content[place:]
        else:
            content += content[place:]
        content = content or bytearray(b"\n")
    if rng.random() < 0.05:
        return bytes(content).decode("utf-8", "replace").encode(rng.choice(["utf-16", "latin-1", "utf-7"]), "replace")
    return bytes(content)


def parquet(path: Path, rng: random.Random) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, object] = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    kind = rng.randrange(6)
    name = rng.choice(list(columns))
    odd: list[object] = [None, 1.5, b"x", [1], {"bytes": None, "path": rng.choice(["a.png", "~no/x", "", "x" * 300])}]
    if kind < 3:
        columns[name] = [rng.choice(odd)] * len(ROWS)
    elif kind == 3:
        del columns[name]
    pq.write_table(pa.table(columns), path)
    if kind == 4:
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 4])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == 5:
        path.write_bytes(path.read_bytes()[: rng.randrange(1, 900)])


def look(path: Path) -> None:
    """What training, scoring and reward training do with a table; each may refuse it."""
    for read in (read_prompts, partial(read_stored, columns=PAIR), read_judged, partial(read_judged, single=True)):
        try:
            for row in read(str(path)):
                for source in getattr(row, "prompt", row).media.values():
                    if not isinstance(source, Path):
                        source.content()
        except DataError as error:
            if printable(error, 10**6) != str(error):
                raise AssertionError("a message with escapes") from error
    read_prompts(str(path), skipped={})


def cases(folder: Path, count: int) -> Iterator[tuple[str, Callable[[], object]]]:
    for name in ("a", "b"):
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder / f"{name}.png")
    few = find_spec("datasets") is not None
    for number in range(count):
        rng = random.Random(f"{SEED} {number}")
        suffix = ".parquet" if few and number % 10 == 9 else rng.choice(list(WRITERS))
        path = folder / f"table{number}{suffix}"
        if suffix == ".parquet":
            parquet(path, rng)
        else:
            path.write_bytes(changed(suffix, rng))
        yield f"{number} {suffix}", partial(look, path)


def test_damaged_tables_are_read_or_refused_in_words(share, tmp_path, monkeypatch):
    if find_spec("datasets") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        datasets.disable_progress_bars()
    count, found = failures(cases(tmp_path, int(TOTAL * share)), (DataError,))
    assert count == int(TOTAL * share)
    assert not found, "\n".join(found)
