"""Prompt sets of published generation benchmarks, read from the files of their authors. None ships here."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from align.data.prompts import Prompt, read_prompts
from align.data.tables import read_rows, table_path
from alignflow.errors import DataError
from alignflow.files.rows import read_lines

Reader = Callable[[str, Path | None], Iterator[Prompt]]
"""(file or folder of the set, folder of its images) -> prompts; ``metadata["category"]`` is the category of each."""


def geneval(source: str, media: Path | None) -> Iterator[Prompt]:
    """GenEval (arXiv 2310.11513): ``prompts/evaluation_metadata.jsonl``; the category is its ``tag``."""
    for place, row in read_rows(source):
        text, tag = _text(row, "prompt", place), _text(row, "tag", place)
        yield Prompt(text, {}, {**row, "category": tag}, place)


def t2i_compbench(source: str, media: Path | None) -> Iterator[Prompt]:
    """T2I-CompBench (arXiv 2307.06350): the folder ``examples/dataset``; its ``*_val.txt`` files are the categories."""
    files = sorted(_folder(source).glob("*_val.txt"))
    if not files:
        raise DataError(f"{source}: no file called <category>_val.txt")
    for file in files:
        category = file.stem.removesuffix("_val")
        for number, line in read_lines(file):
            yield Prompt(line.rstrip("."), {}, {"category": category}, f"{file} line {number}")


def dpg_bench(source: str, media: Path | None) -> Iterator[Prompt]:
    """DPG-Bench (arXiv 2403.05135): ``dpg_bench.csv``, whose rows are questions; ``metadata["questions"]`` holds them.

    A question has its id, text, category and the ids of its parents: it counts as answered with no where a parent is.
    """
    found: dict[str, Prompt] = {}
    with table_path(source).open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            place = f"{source} line {number}"
            item = _text(row, "item_id", place)
            if item not in found:
                metadata: dict[str, Any] = {"category": "all", "questions": []}
                found[item] = Prompt(_text(row, "text", place), {}, metadata, place)
            parents = [int(part) for part in re.findall(r"\d+", row.get("dependency") or "") if int(part)]
            question = {
                "id": _whole(row, "proposition_id", place),
                "question": _text(row, "question_natural_language", place),
                "category": (row.get("category_broad") or "").strip(),
                "parents": parents,
            }
            found[item].metadata["questions"].append(question)
    yield from found.values()


def tiif(source: str, media: Path | None, column: str = "short_description") -> Iterator[Prompt]:
    """TIIF-Bench (arXiv 2506.02161): a ``.jsonl`` or a folder of them; the category is ``type``, short prompts."""
    files = sorted(Path(source).glob("*.jsonl")) if Path(source).is_dir() else [Path(source)]
    if not files:
        raise DataError(f"{source}: no .jsonl file in this folder")
    for file in files:
        for place, row in read_rows(str(file)):
            yield Prompt(_text(row, column, place), {}, {"category": _text(row, "type", place)}, place)


def tiif_long(source: str, media: Path | None) -> Iterator[Prompt]:
    """TIIF-Bench with its long prompts."""
    return tiif(source, media, "long_description")


def imgedit(source: str, media: Path | None) -> Iterator[Prompt]:
    """ImgEdit, basic (arXiv 2505.20275): ``basic_edit.json``; images in ``--media``, the category is ``edit_type``."""
    path = table_path(source)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, dict):
        raise DataError(f"{path}: expected an object of edits by key")
    for key, row in rows.items():
        place = f"{path} key {key!r}"
        row = row if isinstance(row, dict) else {}
        image = (media or path.parent) / _text(row, "id", place)
        if not image.is_file():
            raise DataError(f"{place}: no image {image}; --media names the folder of the set's images")
        yield Prompt(_text(row, "prompt", place), {"image": image}, {"category": _text(row, "edit_type", place)}, place)


def gedit(source: str, media: Path | None, language: str = "en") -> Iterator[Prompt]:
    """GEdit-Bench (arXiv 2504.17761): ``.parquet`` or ``hub:stepfun-ai/GEdit-Bench:train``; English instructions."""
    for place, row in read_rows(source):
        if row.get("instruction_language") == language:
            image = row.get("input_image_raw") or row.get("input_image")
            if image is None:
                raise DataError(f"{place}: needs an image under input_image_raw or input_image")
            category = _text(row, "task_type", place)
            yield Prompt(_text(row, "instruction", place), {"image": image}, {"category": category}, place)


def gedit_cn(source: str, media: Path | None) -> Iterator[Prompt]:
    """GEdit-Bench with its Chinese instructions."""
    return gedit(source, media, "cn")


def dreambench(source: str, media: Path | None) -> Iterator[Prompt]:
    """DreamBench (arXiv 2208.12242): the folder ``dataset``; the input is a subject's first image, the class names it.

    Prompts have the class without a rare token, since the image shows the subject. ``metadata["references"]`` lists the
    other images of the subject.
    """
    folder = _folder(source)
    text = (folder / "prompts_and_classes.txt").read_text(encoding="utf-8")
    classes = re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE)
    lists = [re.findall(r"'(.+?)'\.format", part) for part in text.split("prompt_list")[1:]]
    if len(lists) != 2 or len(classes) < 2:
        raise DataError(f"{folder}/prompts_and_classes.txt is not the list of subjects and prompts of DreamBench")
    for subject, name in classes[1:]:
        images = sorted((folder / subject).glob("*.jpg"))
        if not images:
            raise DataError(f"{folder / subject}: no .jpg image of this subject")
        live = name in ("cat", "dog")
        metadata = {"category": "live" if live else "object", "subject": subject, "references": [*map(str, images[1:])]}
        for prompt in lists[live]:
            written = prompt.replace("{0} ", "").replace("{1}", name)
            yield Prompt(written, {"image": images[0]}, metadata, f"{subject}: {prompt}")


def table(source: str, media: Path | None) -> Iterator[Prompt]:
    """Any source of prompts; the category is the column ``category``, ``tag`` or ``kind``."""
    for prompt in read_prompts(source):
        category = next((prompt.metadata[key] for key in ("category", "tag", "kind") if key in prompt.metadata), "all")
        yield Prompt(prompt.text, prompt.media, {**prompt.metadata, "category": str(category)}, prompt.place)


FORMATS: dict[str, Reader] = {
    "geneval": geneval,
    "t2i-compbench": t2i_compbench,
    "dpg-bench": dpg_bench,
    "tiif": tiif,
    "tiif-long": tiif_long,
    "imgedit": imgedit,
    "gedit": gedit,
    "gedit-cn": gedit_cn,
    "dreambench": dreambench,
    "table": table,
}


def read_set(kind: str, source: str, media: Path | None = None, limit: int | None = None) -> list[Prompt]:
    """Prompts of a set; with ``limit``, so many of every category, the first ones.

    Raises:
        DataError: the files are missing or of another format; names place and key.
    """
    found: list[Prompt] = []
    counts: dict[str, int] = {}
    try:
        for prompt in FORMATS[kind](source, media):
            category = prompt.metadata["category"]
            counts[category] = counts.get(category, 0) + 1
            if limit is None or counts[category] <= limit:
                found.append(prompt)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise DataError(f"{source} holds no prompts of the format {kind}")
    return found


def _folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(f"{source} is not a folder")
    return folder


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: needs a text under {key!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    return value.strip()


def _whole(row: dict[str, Any], key: str, place: str) -> int:
    try:
        return int(row[key])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{place}: needs a whole number under {key!r}, given {row.get(key)!r:.40}") from None
