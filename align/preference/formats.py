"""Published preference sets in their own formats -> pairs. No torch; no image is opened here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from align.data.prompts import Prompt
from align.data.tables import HUB, Cell, Row, is_tie, read_rows
from alignflow.errors import DataError

Media = Path | Cell


@dataclass(frozen=True, eq=False)
class Pair:
    """Two media of one prompt.

    Args:
        prompt: text, and what it came with (``image``, the source of an edit).
        label: 1 = people prefer the first, -1 = the second, 0 = a tie.
        cluster: number of the row it comes from: pairs of one row are not independent.
    """

    prompt: Prompt
    first: Media
    second: Media
    label: int
    cluster: int


@dataclass(frozen=True)
class Reader:
    """One row of a set, as its format reads it.

    Args:
        folder: what its file names are relative to.
        judgement: which of several judgements of a pair counts, where a set has several.
    """

    place: str
    row: Mapping[str, Any]
    number: int
    folder: Path
    judgement: str

    def get(self, *names: str) -> Any:
        """The first of the columns that the row has; DataError if it has none of them."""
        for name in names:
            if self.row.get(name) is not None:
                return self.row[name]
        has = ", ".join(map(str, self.row)) or "nothing"
        raise DataError(f"{self.place}: needs {' or '.join(map(repr, names))}; it has {has}. Is it of this format?")

    def one_of(self, name: str, meanings: Mapping[Any, int]) -> int:
        """The label that the value under ``name`` stands for."""
        value = self.get(name)
        key = value.strip() if isinstance(value, str) else value
        try:
            return meanings[key]
        except (KeyError, TypeError):  # a list or an object cannot be a key
            known = ", ".join(map(repr, meanings))
            raise DataError(f"{self.place}: {name!r} is {value!r:.40}, not one of {known}") from None

    def file(self, value: Any, name: str) -> Media:
        """A file's name, made a path that exists, or an image inside the set."""
        if isinstance(value, Cell):
            return value
        if not isinstance(value, str) or not value:
            raise DataError(f"{self.place}: {name!r} should be a file name, given {value!r:.80}")
        path = self.folder / value
        if not path.is_file():
            raise DataError(f"{self.place}: no file {path}; --media names the folder that its file names start from")
        return path

    def pair(self, text: Any, first: Any, second: Any, label: int, media: Mapping[str, Media] | None = None) -> Pair:
        """The pair of two files of this row."""
        if not isinstance(text, str):
            raise DataError(f"{self.place}: the prompt should be a text, given {text!r:.80}")
        prompt = Prompt(text, media or {}, {}, self.place)
        return Pair(prompt, self.file(first, "first"), self.file(second, "second"), label, self.number)

    def ranked(self, text: Any, files: Any, ranks: Any, *, higher: bool = False) -> Iterator[Pair]:
        """Every two of several files; the lower rank (``higher``: the higher number) is the better, equal is a tie."""
        good = isinstance(files, list) and isinstance(ranks, list) and len(files) == len(ranks)
        if not good or not all(isinstance(rank, int | float) for rank in ranks):
            raise DataError(f"{self.place}: needs as many ranks (numbers) as files")
        for i, j in combinations(range(len(files)), 2):
            label = (ranks[i] < ranks[j]) - (ranks[i] > ranks[j])
            yield self.pair(text, files[i], files[j], -label if higher else label)


def _pairs(row: Reader) -> Iterator[Pair]:
    """This suite's own: prompt, chosen, rejected[, tie]."""
    label = 0 if is_tie(row.row.get("tie"), row.place) else 1
    yield row.pair(row.get("prompt"), row.get("chosen"), row.get("rejected"), label)


def _hpdv2(row: Reader) -> Iterator[Pair]:
    """HPDv2 test.json: prompt, image_path[], rank[] (arXiv 2306.09341); train.json: file_path[], human_preference[]."""
    if "human_preference" in row.row:
        yield from row.ranked(row.get("prompt"), row.get("file_path"), row.get("human_preference"), higher=True)
    else:
        yield from row.ranked(row.get("prompt"), row.get("image_path"), row.get("rank"))


def _hpdv3(row: Reader) -> Iterator[Pair]:
    """HPDv3: prompt, path1, path2; path1 is the better (arXiv 2508.03789)."""
    yield row.pair(row.get("prompt"), row.get("path1"), row.get("path2"), 1)


def _image_reward(row: Reader) -> Iterator[Pair]:
    """ImageReward test.json: prompt, generations[], ranking[] (arXiv 2304.05977)."""
    yield from row.ranked(row.get("prompt"), row.get("generations"), row.get("ranking"))


def _pick_a_pic(row: Reader) -> Iterator[Pair]:
    """Pick-a-Pic: caption, jpg_0, jpg_1, label_0 (1, 0, or 0.5 = tie), has_label (arXiv 2305.01569)."""
    if row.row.get("has_label", True) in (False, "False", "false"):
        return
    label = row.one_of("label_0", {1: 1, 0: -1, 0.5: 0, "1": 1, "0": -1, "0.5": 0, "1.0": 1, "0.0": -1})
    yield row.pair(row.get("caption"), row.get("jpg_0"), row.get("jpg_1"), label)


def _genai_bench(row: Reader) -> Iterator[Pair]:
    """GenAI-Bench: left_*, right_*, vote_type of GenAI-Arena; both ties are ties (arXiv 2406.04485)."""
    label = row.one_of("vote_type", {"leftvote": 1, "rightvote": -1, "tievote": 0, "bothbad_vote": 0})
    media = {"image": row.file(row.row["source_image"], "source_image")} if row.row.get("source_image") else None
    left, right = (row.get(*(f"{side}_{what}" for what in ("image", "output_image", "video"))) for side in SIDES)
    yield row.pair(row.get("prompt", "instruct_prompt"), left, right, label, media)


def _mj_bench(row: Reader) -> Iterator[Pair]:
    """MJ-Bench: caption, image0, image1, label = number of the better (arXiv 2407.04842)."""
    label = row.one_of("label", {0: 1, 1: -1, "0": 1, "1": -1})
    yield row.pair(row.get("caption"), row.get("image0"), row.get("image1"), label)


def _videogen(row: Reader) -> Iterator[Pair]:
    """VideoGen-RewardBench .csv: prompt, path_A, path_B, Overall, VQ, MQ, TA = A, B or same (arXiv 2501.13918)."""
    judgement = row.judgement or "Overall"
    if judgement in ("Overall", "VQ", "MQ", "TA") and row.row.get(judgement) is None:
        return  # a pair that nobody judged in this respect
    label = row.one_of(judgement, {"A": 1, "B": -1, "same": 0})
    yield row.pair(row.get("prompt"), row.get("path_A"), row.get("path_B"), label)


def _mmrb2(row: Reader) -> Iterator[Pair]:
    """MMRB2 t2i.json and edit.json as built: prompt_content, response_a, response_b, chosen (arXiv 2512.16899)."""
    label = row.one_of("chosen", {"A": 1, "B": -1})
    texts, sources = _contents(row, row.get("prompt_content"))
    answers = [_contents(row, _inside(row, name))[1] for name in ("response_a", "response_b")]
    if any(len(images) != 1 for images in answers) or len(sources) > 1:
        return  # interleaved answers are not for rewards of one image
    media = {"image": row.file(sources[0], "prompt_content")} if sources else None
    yield row.pair("\n".join(texts), answers[0][0], answers[1][0], label, media)


def _inside(row: Reader, name: str) -> Any:
    """``response_content`` of an answer."""
    answer = row.get(name)
    return answer.get("response_content") if isinstance(answer, dict) else answer


def _contents(row: Reader, parts: Any) -> tuple[list[str], list[str]]:
    """Texts and image files of ``[[kind, value], ...]``."""
    if not isinstance(parts, list) or not all(isinstance(part, list) and len(part) == 2 for part in parts):
        raise DataError(f'{row.place}: contents should be [["text" or "image", "..."], ...], given {parts!r:.80}')
    return [value for kind, value in parts if kind == "text"], [value for kind, value in parts if kind == "image"]


SIDES = ("left", "right")

FORMATS: dict[str, Callable[[Reader], Iterator[Pair]]] = {
    "pairs": _pairs,
    "hpdv2": _hpdv2,
    "hpdv3": _hpdv3,
    "image-reward": _image_reward,
    "pick-a-pic": _pick_a_pic,
    "genai-bench": _genai_bench,
    "mj-bench": _mj_bench,
    "videogen-rewardbench": _videogen,
    "mmrb2": _mmrb2,
}
"""Name -> reader; the first line of a reader's docstring says what its rows hold."""


def read_set(
    kind: str, source: str, *, media: Path | None = None, judgement: str = "", limit: int | None = None
) -> list[Pair]:
    """Pairs of a published set, in its order.

    Args:
        kind: one of :data:`FORMATS`.
        source: its .json, .jsonl, .csv or .parquet file, or ``hub:owner/name[:split]``.
        media: folder its file names are relative to; the file's own by default.
        judgement: which judgement counts, where there are several.
        limit: read only the first so many rows.

    Raises:
        DataError: not there, of another format, or without the file it names; names row and column.
    """
    if kind not in FORMATS:
        raise DataError(f"no such format {kind!r}; there are {', '.join(FORMATS)}")
    folder = media or (Path() if source.startswith(HUB) else Path(source).parent)
    rows = _json_rows(Path(source)) if source.lower().endswith(".json") else read_rows(source)
    found: list[Pair] = []
    for number, (place, row) in enumerate(islice(rows, limit)):
        found.extend(FORMATS[kind](Reader(place, row, number, folder, judgement)))
    if not found:
        raise DataError(f"{source} holds no pairs of format {kind}")
    return found


def _json_rows(path: Path) -> Iterator[Row]:
    """Objects of a JSON list, or of the list under ``pairs``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"file {path} does not exist (looked in {Path.cwd()})") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    rows: Sequence[Any] = data.get("pairs", []) if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path}: expected a list of objects, or {{"pairs": [...]}}')
    for number, row in enumerate(rows, 1):
        yield f"{path} entry {number}", row
