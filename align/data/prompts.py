"""Prompts from the embedded worlds, files or datasets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.tables import HUB, Cell, read_rows, table_path
from alignflow.errors import DataError
from alignflow.files.rows import RowError, place_of, read_lines
from alignflow.lazy import lazy
from alignflow.paths import expanded, is_file
from alignflow.text import printable
from alignflow.worlds.shapes import WORLDS

if TYPE_CHECKING:
    from align.data.media import encode
    from alignflow.worlds.shapes import edits, motion
    from alignflow.worlds.shapes import world as images
    from alignflow.worlds.shapes.edits import Task
else:
    edits = lazy("alignflow.worlds.shapes.edits")
    motion = lazy("alignflow.worlds.shapes.motion")
    images = lazy("alignflow.worlds.shapes.world")
    encode = lazy("align.data.media:encode")

TRAIN_COUNT = 4096
"""Number of prompts taken from an embedded world's endless training split."""

MEDIA = ("image", "mask")
"""Optional media of a prompt: the source image, and a mask that is white where it is to be repainted."""

PAIR = ("chosen", "rejected")
"""The media of a stored preference, better first."""


NOTHING: Mapping[str, Any] = {}
"""The empty mapping that most rows share: a table may have a million rows."""


@dataclass(frozen=True, eq=False, slots=True)
class Prompt:
    """Request for one sample. Its files are opened only when a step needs them.

    Args:
        text: the prompt.
        media: name -> file, or image inside a dataset.
        metadata: everything else in its row, for rewards that need it.
        place: where it was written, for messages.
    """

    text: str
    media: Mapping[str, Path | Cell] = field(default_factory=lambda: NOTHING)
    metadata: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    place: str = ""

    @property
    def where(self) -> str:
        """Its place, or the text itself where nobody noted one."""
        return self.place or repr(self.text)


def read_prompts(
    source: str, count: int | None = None, seed: int = 0, *, skipped: dict[str, str] | None = None
) -> list[Prompt]:
    """Prompts of an embedded world (``shapes:train``, ``shapes-edit:heldout``), a file or a dataset, in their order.

    Those of ``shapes-edit`` come with an image, those of ``shapes-fill`` with an image and a mask, drawn when they are
    asked for. A dataset is ``hub:owner/name[:split]``. A ``.txt`` holds one prompt a line. In a ``.jsonl``, ``.csv``,
    ``.parquet`` or dataset the column ``prompt`` is the text, ``image`` and ``mask`` are files relative to the table's
    folder, the rest is metadata (so is what an object under ``metadata`` holds).

    Args:
        count: at most so many; a file's first ones, the world's by ``seed``.
        skipped: takes place -> why of rows that cannot be used, which are then left out; None = they are errors.

    Raises:
        DataError: missing, empty or unreadable; names file, line and key, and what to do.
    """
    if re.match(r"shapes[\w-]*:", source):
        return _embedded_prompts(source, count or TRAIN_COUNT, seed)
    found = list(
        islice(_text_prompts(source) if source.lower().endswith(".txt") else read_table(source, (), skipped), count)
    )
    if not found:
        raise DataError(f"{printable(source, 300)} holds no prompts")
    return found


def read_table(source: str, needed: Sequence[str] = (), skipped: dict[str, str] | None = None) -> Iterator[Prompt]:
    """Prompts of the rows of a table, one by one.

    Args:
        needed: media every row must name.
        skipped: see :func:`read_prompts`.
    """
    folder = Path() if source.startswith(HUB) else table_path(source).parent
    for place, row in read_rows(source):
        try:
            prompt = prompt_of_row(row, place, folder, {*MEDIA, *needed}, needed)
        except DataError as error:
            if skipped is None:
                raise
            skipped[place] = str(error)
        else:
            yield prompt


def read_stored(source: str, columns: Sequence[str], skipped: dict[str, str] | None = None) -> list[Prompt]:
    """Prompts with a file in each of ``columns`` of every row; every file is checked to exist.

    Raises:
        DataError: names the line of what is missing.
    """
    rows = list(read_table(source, columns, skipped))
    if not rows:
        raise DataError(f"{source} holds no rows: each has prompt, {', '.join(columns)}")
    return rows


def _embedded_prompts(source: str, count: int, seed: int) -> list[Prompt]:
    world, split = source.split(":", 1)
    if world not in WORLDS or split not in ("train", "heldout"):
        raise DataError(
            f"prompts {source!r}: the embedded worlds are {', '.join(WORLDS)}, each with :train and :heldout"
        )
    if world in ("shapes", "shapes-video"):
        drawn = images if world == "shapes" else motion
        texts, specs = drawn.prompts(split, count, seed), drawn.sample_specs(split, count, seed)
        rows = enumerate(zip(texts, specs, strict=True))
        return [Prompt(text, {}, {"kind": spec.task}, f"{source}, prompt {row}") for row, (text, spec) in rows]

    tasks = list(islice(edits.TASKS[world](split, seed), count))
    drawings = Drawings(tasks)
    names = MEDIA if tasks[0].hole else MEDIA[:1]
    return [
        Prompt(
            task.text,
            {name: Cell(drawings, row, name) for name in names},
            {"kind": task.edit.kind, **task.to_dict()},
            f"{source}, prompt {row}",
        )
        for row, task in enumerate(tasks)
    ]


class Drawings:
    """The images of embedded tasks as the column of a dataset: nothing is rendered before it is read."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks

    def __getitem__(self, row: int) -> dict[str, Any]:
        task = self.tasks[row]
        hole = {"mask": np.stack([edits.draw_mask(task.hole)] * 3, -1)} if task.hole else {}
        return {
            name: {"bytes": encode(pixels, ".png")}
            for name, pixels in {"image": images.render(task.source), **hole}.items()
        }


def _text_prompts(source: str) -> Iterator[Prompt]:
    path = table_path(source)
    try:
        for number, line in read_lines(path):
            yield Prompt(line, place=place_of(path, number))
    except RowError as error:
        raise DataError(str(error)) from None


def prompt_of_row(row: dict[str, Any], place: str, folder: Path, names: set[str], needed: Sequence[str]) -> Prompt:
    """The prompt of one table row; columns in ``names`` hold media files, relative to ``folder``.

    Raises:
        DataError: the row has no text under ``prompt``, or lacks a column in ``needed``; names ``place``.
    """
    text = row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{place}: needs a text under "prompt"; {_instead(row)}')
    media = {name: _file(row[name], name, place, folder) for name in sorted(names) if row.get(name) is not None}
    for name in needed:
        if name not in media:
            raise DataError(f'{place}: needs a file under "{name}"')
    other = {key: value for key, value in row.items() if key not in names and key != "prompt"}
    if isinstance(other.get("metadata"), dict):
        inner = other.pop("metadata")
        for name in inner:
            if name in other:
                raise DataError(f'{place}: "{printable(name, 80)}" is both beside "metadata" and in it')
        other |= inner
    return Prompt(text.strip(), media or NOTHING, other or NOTHING, place)


def _instead(row: dict[str, Any]) -> str:
    if "prompt" in row:
        value = row["prompt"]
        return "it is empty there" if isinstance(value, str) else f"it is {printable(repr(value), 80)} there"
    has = ", ".join(printable(name, 80) for name in row) or "nothing"
    return f'it has {has}: call the text\'s column "prompt"'


def _file(value: Any, name: str, place: str, folder: Path) -> Path | Cell:
    if isinstance(value, Cell):
        return value
    if not isinstance(value, str) or not value:
        raise DataError(f'{place}: "{name}" should be a file name, given {printable(repr(value), 80)}')
    try:
        path = folder / expanded(value)
    except ValueError as error:
        raise DataError(f'{place}: "{name}": {error}') from None
    if not is_file(path):
        raise DataError(
            f'{place}: no {name} {printable(path, 300)}; "{name}" is a path relative to {folder.resolve()}, or absolute'
        )
    return path


def check_media(prompts: Iterable[Prompt], names: Iterable[str], who: str) -> None:
    """Raise DataError for the first prompt without the images ``who`` needs; metadata every prompt has."""
    names = list(names)
    for prompt in prompts:
        if said := lacking(prompt, names, who):
            raise DataError(said)


def lacking(prompt: Prompt, names: Iterable[str], who: str) -> str:
    """The problem if a prompt lacks an image that ``who`` needs, else ''."""
    for name in names:
        if name != "metadata" and name not in prompt.media:
            return (
                f"{prompt.where}: {who} needs {name!r} with every prompt; "
                f'name a file under "{name}" in a .jsonl, .csv or .parquet'
            )
    return ""
