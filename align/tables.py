"""Rows of a JSONL, CSV or parquet file or a dataset: dicts of columns, each with the place it was read from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import DataError
from alignflow.extras import optional

HUB = "hub:"
Row = tuple[str, dict[str, Any]]
"""(where it stands, column -> value)."""


@dataclass(frozen=True)
class Cell:
    """A picture inside a dataset, read when it is asked for.

    Args:
        column: a dataset of this column alone.
        row: number of the row.
        name: the column's name.
    """

    column: Any
    row: int
    name: str

    def content(self) -> bytes | Path | None:
        """The file's bytes, or its path where the dataset holds only that; None for an empty cell."""
        value = self.column[self.row][self.name]
        if isinstance(value, dict):
            value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
        return value


def read_rows(source: str) -> Iterator[Row]:
    """Rows of a ``.jsonl``, ``.csv`` or ``.parquet`` file, or of ``hub:owner/name[:split]``, in their order.

    Raises:
        DataError: missing, unreadable or of another type; names the line or row.
    """
    if source.startswith(HUB):
        yield from _dataset_rows(source, *_hub_name(source))
        return
    path = Path(source)
    if not path.is_file():
        raise DataError(f"file {path} does not exist (looked in {Path.cwd()})")
    kind = path.suffix.lower()
    if kind == ".jsonl":
        yield from _json_rows(path)
    elif kind == ".csv":
        yield from _csv_rows(path)
    elif kind == ".parquet":
        yield from _dataset_rows(source, "parquet", "train", data_files=str(path))
    else:
        raise DataError(
            f"{path} ends in {path.suffix!r}; tables are read from .jsonl, .csv, .parquet and hub:owner/name[:split], "
            "prompts also from .txt"
        )


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of every line that is not blank. Raises DataError for what is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    # splitlines would also split at separators that JSON and prompts may hold
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in read_lines(path):
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise DataError(f'{place}: expected an object like {{"prompt": "..."}}')
        yield place, row


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="")
        try:
            for row in reader:
                place = f"{path} line {reader.line_num}"
                if "" in row:
                    raise DataError(f"{place}: more cells than the header has columns; quote cells that hold commas")
                yield place, {name: value for name, value in row.items() if value}
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num + 1}: not CSV ({error})") from None


# -- datasets ---------------------------------------------------------------------------------------------------------


def _hub_name(source: str) -> tuple[str, str]:
    """``hub:owner/name[:split]`` -> (name, split); the split is ``train`` where none is named."""
    name, _, split = source.removeprefix(HUB).partition(":")
    if not name:
        raise DataError(f"{source!r}: a dataset reads hub:owner/name or hub:owner/name:split")
    return name, split or "train"


def _dataset_rows(source: str, name: str, split: str, **options: Any) -> Iterator[Row]:
    """Rows of a dataset; pictures stay inside it as :class:`Cell`."""
    table = _load(source, name, split, **options)
    kept = [column for column, feature in table.features.items() if _is_picture(feature)]
    columns = {column: table.select_columns([column]) for column in kept}
    for number, row in enumerate(table.remove_columns(kept)):
        cells = {column: Cell(only, number, column) for column, only in columns.items()}
        yield f"{source} row {number + 1}", {key: value for key, value in row.items() if value is not None} | cells


def _load(source: str, name: str, split: str, **options: Any) -> Any:
    datasets = optional("datasets", source, DataError)
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):  # save_to_disk
            saved = datasets.load_from_disk(name)
            table = saved[split] if isinstance(saved, dict) else saved
        else:
            table = datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # a hierarchy of its own, and that of the hub client below it
        said = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{source}: split {split!r} cannot be loaded: {type(error).__name__}: {said}") from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _is_picture(feature: Any) -> bool:
    """Whether a column holds files: an image feature, a struct with bytes, or plain bytes."""
    return (
        type(feature).__name__ == "Image"
        or (isinstance(feature, dict) and "bytes" in feature)
        or getattr(feature, "dtype", None) in ("binary", "large_binary")
    )
