"""Prompt sets of published generation benchmarks, read from the files of their authors. None ships here."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from align.data.prompts import Prompt, read_prompts
from align.data.tables import read_rows, table_path
from alignflow.errors import DataError
from alignflow.files.rows import read_lines

J = TypeVar("J", list[Any], dict[str, Any])
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


REASONING = {
    "idiom_interpretation": ("idiom", {"reason_evaluation": 1.0}),
    "textual_image_design": ("textual_image", {"reason_evaluation": 1.0}),
    "entity_reasoning": ("entity", {"entity_evaluation": 0.7, "other_details_evaluation": 0.3}),
    "scientific_reasoning": ("scientific", {"scientific_evaluation": 0.7, "other_details_evaluation": 0.3}),
}
"""Dimension of T2I-ReasonBench -> name of its question file, and the share of each list in the reasoning accuracy."""


def t2i_reasonbench(source: str, media: Path | None) -> Iterator[Prompt]:
    """T2I-ReasonBench (arXiv 2508.17472): the folder of the authors' repository; the category is the dimension.

    ``metadata["questions"]`` holds the questions with their criteria. Their weights give the authors' reasoning
    accuracy as the score; the questions on image quality have no weight.
    """
    folder = _folder(source)
    for dimension, (name, shares) in REASONING.items():
        path = folder / "prompts" / f"{dimension}.json"
        asked_path = folder / "deepseek_evaluation_qs" / f"evaluation_{name}.json"
        rows, asked = (_json(file, list) for file in (path, asked_path))
        known = {one.get("id"): one for one in asked if isinstance(one, dict)}
        for number, row in enumerate(rows, 1):
            place = f"{path} item {number}"
            row = row if isinstance(row, dict) else {}
            text, one = _text(row, "prompt", place), known.get(row.get("id"))
            if one is None:
                raise DataError(f"{place}: {asked_path} has no questions for id {row.get('id')!r}")
            questions = [
                question
                for key, share in {**shares, "quality_evaluation": 0.0}.items()
                for question in _criteria(one.get(key), key, share, f"{asked_path} id {row['id']}")
            ]
            for place_in_list, question in enumerate(questions, 1):
                question["id"] = place_in_list
            yield Prompt(text, {}, {**row, "category": dimension, "questions": questions}, place)


def _criteria(listed: Any, key: str, share: float, place: str) -> list[dict[str, Any]]:
    """Questions q1, q2, ... of a list with their criteria c1, c2, ...; ``share`` is their weight in all."""
    listed = listed if isinstance(listed, dict) else {}
    names = [found for name in listed if (found := re.fullmatch(r"(.*)q(\d+)", name))]
    if not names:
        raise DataError(f"{place}: needs questions q1, q2, ... under {key!r}")
    return [
        {
            "question": _text(listed, name[0], place),
            "criterion": _criterion(listed, f"{name[1]}c{name[2]}", place),
            "category": key.removesuffix("_evaluation"),
            "weight": share / len(names),
        }
        for name in names
    ]


def _criterion(listed: dict[str, Any], key: str, place: str) -> str:
    """The scores of a question and what earns them; a few files have an object with a text per score."""
    if isinstance(found := listed.get(key), dict):
        return "; ".join(f"{score}: {text}" for score, text in found.items())
    return _text(listed, key, place)


def densealignbench(source: str, media: Path | None) -> Iterator[Prompt]:
    """DenseAlignBench (PromptEcho, arXiv 2604.12652): ``metadata.jsonl``, 2,000 dense captions in one category."""
    for place, row in read_rows(source):
        yield Prompt(_text(row, "caption", place), {}, {"category": "all"}, place)


def imgedit(source: str, media: Path | None) -> Iterator[Prompt]:
    """ImgEdit, basic (arXiv 2505.20275): ``basic_edit.json``; images in ``--media``, the category is ``edit_type``."""
    path = table_path(source)
    for key, row in _json(path, dict).items():
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
    "t2i-reasonbench": t2i_reasonbench,
    "densealignbench": densealignbench,
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


def _json(path: Path, kind: type[J]) -> J:
    """A whole file of JSON: a list or an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, kind):
        raise DataError(f"{path}: expected {'a list' if kind is list else 'an object'}")
    return found


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
