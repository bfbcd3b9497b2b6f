"""``metrics.jsonl``: one row per event. An unreadable row loses only that row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from align.data.files import without_nan, write_text, writing
from alignflow.errors import RunFolderError

Row = dict[str, Any]


def append(path: Path, row: Row, *, durable: bool = False) -> None:
    """Add one row; ``durable`` has it, and all before it, on the disk when this returns.

    Raises:
        RunFolderError: the disk refuses, or the file has gone.
    """
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(without_nan(row)) + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Have all rows written so far on the disk."""
    with writing(path):
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Path) -> tuple[list[Row], int]:
    """All rows that can be read, and how many lines cannot: torn, empty, not a mapping, without event and step.

    Raises:
        RunFolderError: the file is there and the system refuses it.
    """
    if not path.exists():
        return [], 0
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
    found = [_row(line) for line in (lines if lines[-1] else lines[:-1])]
    rows = [row for row in found if row is not None]
    return rows, len(found) - len(rows)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("event"), str) and type(row.get("step")) is int
    return row if whole else None


def keep_until(path: Path, step: int) -> int:
    """Drop the rows after ``step``, which a resumed run writes again, and unreadable lines; how many of the latter."""
    rows, unreadable = read(path)
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    return unreadable
