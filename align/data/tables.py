"""Rows of a JSONL, CSV or parquet file or a dataset: dicts of columns, each with its source location."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignflow import hub
from alignflow.errors import DataError, Problem
from alignflow.extras import optional, remedy
from alignflow.files.rows import RowError, csv_rows, json_rows
from alignflow.paths import expanded, is_file
from alignflow.text import first_line, printable

HUB = "hub:"
Row = tuple[str, dict[str, Any]]
"""(where it stands, column -> value)."""


@dataclass(frozen=True)
class Cell:
    """An image inside a dataset, read on access.

    Args:
        column: a dataset of this column alone.
        row: number of the row.
        name: the column's name.
        folder: what a path in it is relative to.
    """

    column: Any
    row: int
    name: str
    folder: Path = Path()

    def content(self) -> bytes | Path | None:
        """The file's bytes, or its path where the dataset holds only that; None for an empty cell."""
        value = self.column[self.row][self.name]
        if isinstance(value, dict):
            value = value.get("bytes") or (self.folder / value["path"] if value.get("path") else None)
        return value


TRUE, FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no", "")
"""Cells of a column that says yes or no."""
TEXTS = ("prompt", "text", "user", "image", "mask", "chosen", "rejected", "sample")
"""Columns of a CSV whose cells are text, whatever they look like."""


def read_rows(source: str) -> Iterator[Row]:
    """Rows of a ``.jsonl``, ``.csv`` or ``.parquet`` file, or of ``hub:owner/name[:split]``, in their order.

    Raises:
        DataError: missing, unreadable, malformed or of another type; names the line or row.
    """
    if source.startswith(HUB):
        yield from _dataset_rows(source, *_hub_name(source))
        return
    path = table_path(source)
    kind = path.suffix.lower()
    try:
        if kind == ".jsonl":
            yield from json_rows(path)
        elif kind == ".csv":
            yield from csv_rows(path, TEXTS)
        elif kind == ".parquet":
            files = glob.escape(str(path))  # datasets reads names as patterns
            yield from _dataset_rows(source, "parquet", "train", path.parent, data_files=files)
        else:
            raise DataError(
                f"{printable(path)} ends in {path.suffix!r}; tables are read from .jsonl, .csv, .parquet and "
                "hub:owner/name[:split], prompts also from .txt"
            )
    except RowError as error:
        raise DataError(str(error)) from None


def table_path(source: str) -> Path:
    """The file that ``source`` names, ``~`` replaced; DataError if there is none."""
    try:
        path = expanded(source)
    except ValueError as error:
        raise DataError(f"{printable(source, 300)}: {error}") from None
    if not is_file(path):
        raise DataError(f"file {printable(path, 300)} does not exist (looked in {Path.cwd()})")
    return path


def table_problems(path: str, source: str, read: Callable[[str], object]) -> list[Problem]:
    """Why ``read`` cannot read the file that the setting ``path`` names. Datasets of the hub are not tried."""
    if source.startswith(HUB):
        return _hub(path, source)
    try:
        read(source)
    except DataError as error:
        return [Problem(path, str(error))]
    return []


def _hub(path: str, source: str) -> list[Problem]:
    """A dataset is fetched when the run begins; here only whether it can be."""
    if find_spec("datasets") is None:
        return [Problem(path, f"{source} needs the package datasets: {remedy('datasets')}")]
    return []


# -- datasets ---------------------------------------------------------------------------------------------------------


def _hub_name(source: str) -> tuple[str, str]:
    """``hub:owner/name[:split]`` -> (name, split); the split is ``train`` where none is named."""
    name, _, split = source.removeprefix(HUB).partition(":")
    if not name:
        raise DataError(f"{source!r}: a dataset reads hub:owner/name or hub:owner/name:split")
    return name, split or "train"


def _dataset_rows(source: str, name: str, split: str, folder: Path = Path(), **options: Any) -> Iterator[Row]:
    """Rows of a dataset; images stay inside it as :class:`Cell`, whose paths are relative to ``folder``."""
    table = _load(source, name, split, **options)
    kept = [column for column, feature in table.features.items() if _is_image(feature)]
    columns = {column: table.select_columns([column]) for column in kept}
    for number, row in enumerate(table.remove_columns(kept)):
        cells = {column: Cell(only, number, column, folder) for column, only in columns.items()}
        yield f"{source} row {number + 1}", {key: value for key, value in row.items() if value is not None} | cells


def _load(source: str, name: str, split: str, **options: Any) -> Any:
    datasets = optional("datasets", source, DataError)
    silent = hub.silent() if source.startswith(HUB) and not name.startswith((".", "/", "~")) else ""
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):  # save_to_disk
            saved = datasets.load_from_disk(name)
            table = saved[split] if isinstance(saved, dict) else saved
        else:
            with hub.offline() if silent else nullcontext():  # a copy in the cache is found without a network too
                table = datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # its own hierarchy, and that of the hub client below it
        said = f"{type(error).__name__}: {first_line(error)}" if not silent else hub.unavailable(name, "dataset")
        raise DataError(f"{printable(source, 300)}: split {split!r} cannot be loaded: {said}") from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _is_image(feature: Any) -> bool:
    """Whether a column holds files: an image feature, a struct with bytes, or plain bytes."""
    return (
        type(feature).__name__ == "Image"
        or (isinstance(feature, dict) and "bytes" in feature)
        or getattr(feature, "dtype", None) in ("binary", "large_binary")
    )


def is_tie(value: Any, place: str) -> bool:
    """Value of a cell of the column ``tie``, where an empty cell is no; raises DataError."""
    said = "" if value is None else str(value).strip().lower()
    if said not in (*TRUE, *FALSE):
        raise DataError(f'{place}: "tie" should be true or false, given {value!r:.40}')
    return said in TRUE
