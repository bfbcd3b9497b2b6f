"""Incremental output of scores as CSV, JSONL, JSON or parquet, resumed where an earlier run stopped."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from align.data.files import write_bytes, write_text, writing
from align.evaluation.files import parts_of
from alignflow.errors import DataError
from alignflow.extras import optional
from alignflow.text import first_line

EVERY = 5.0
"""Seconds after which a JSON or parquet file, which cannot grow by a line, is written anew."""
WHOLE = (".json", ".parquet")
"""Files that are written as a whole, rows of an earlier run included."""


class Output:
    """A file of rows; :attr:`done` holds (file, prompt) of those that an earlier run wrote.

    CSV and parquet have a column ``reward/part`` for every part of a score, which is added once a row has it. JSON has
    them under ``parts``.

    Args:
        path: ``.csv``, ``.jsonl``, ``.json`` or ``.parquet``, which has the columns of the CSV.
        names: columns of scores.

    Raises:
        DataError: another suffix, or the file holds something else, such as other columns; parquet without the package
            that reads and writes it.
        RunFolderError: the disk refuses.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names, self.kind = path, list(names), path.suffix.lower()
        if self.kind not in (".csv", ".jsonl", *WHOLE):
            raise DataError(f"--out {path}: scores are written as .csv, .jsonl, .json or .parquet")
        if self.kind == ".parquet":
            optional("datasets", f"--out {path}", DataError)  # which brings pyarrow
        self.parts: list[str] = []
        self.rows: list[dict[str, Any]] = []
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.done = self._read() if path.exists() else set()
            self.file: IO[str] | None = None if self.kind in WHOLE else self._opened()
            if self.kind == ".csv" and self.file is not None and not self.file.tell():
                self._line(self.head)
        self.written = time.monotonic()

    @property
    def head(self) -> list[str]:
        """Columns of a CSV or parquet file."""
        return ["file", "prompt", *self.names, *self.parts, "reasons"]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows of :func:`align.evaluation.files.score_items`."""
        with writing(self.path):
            for row in rows:
                kept = {name: row[name] for name in ("file", "prompt", "scores", "reasons")}
                kept |= {"parts": row["parts"]} if row["parts"] else {}
                scored = {**row["scores"], **parts_of(row)}
                flat = {"file": row["file"], "prompt": row["prompt"], **scored, "reasons": _why(row)}
                if self.kind in (".csv", ".parquet"):
                    self._widen(scored)
                if self.kind == ".csv":
                    self._line([_cell(flat.get(name)) for name in self.head])
                elif self.kind == ".parquet":
                    self.rows.append(flat)
                elif self.file is not None:
                    self.file.write(json.dumps(kept, ensure_ascii=False) + "\n")
                else:
                    self.rows.append(kept)
            if self.file is not None:
                self.file.flush()
        if self.file is None and time.monotonic() - self.written > EVERY:
            self._whole()

    def close(self) -> None:
        """Write what is not written yet."""
        if self.file is None:
            self._whole()
        else:
            self.file.close()

    def _opened(self) -> IO[str]:
        return self.path.open("a", encoding="utf-8", newline="")

    def _widen(self, scored: Iterable[str]) -> None:
        """Add the columns of parts that no row had before; the rows of a CSV file are written again with them."""
        new = [name for name in scored if name not in self.names and name not in self.parts]
        if not new:
            return
        width = len(self.head)
        self.parts += new
        if self.file is None:
            return
        self.file.close()
        with self.path.open(encoding="utf-8", newline="") as before:
            rows = list(csv.reader(before))[1:]
        lines = [self.head, *([*row[: width - 1], *([""] * len(new)), row[-1]] for row in rows)]
        write_text(self.path, "".join(map(_csv_line, lines)))
        self.file = self._opened()

    def _whole(self) -> None:
        if self.kind == ".parquet":
            write_bytes(self.path, self._parquet())
        else:
            write_text(self.path, json.dumps(self.rows, ensure_ascii=False, indent=2) + "\n")
        self.written = time.monotonic()

    def _parquet(self) -> bytes:
        pyarrow, parquet = (optional(name, self.path.name, DataError) for name in ("pyarrow", "pyarrow.parquet"))
        kinds = {name: pyarrow.float64() for name in (*self.names, *self.parts)}
        columns = {
            name: pyarrow.array([row.get(name) for row in self.rows], type=kinds.get(name, pyarrow.string()))
            for name in self.head
        }
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), buffer)
        return buffer.getvalue()

    def _line(self, cells: Sequence[str]) -> None:
        assert self.file is not None
        self.file.write(_csv_line(cells))

    def _read(self) -> set[tuple[str, str]]:
        """(file, prompt) of the rows that are there; a last line that was cut off is removed."""
        try:
            if self.kind == ".parquet":
                return self._read_parquet(self.path.read_bytes())
            text = self.path.read_text(encoding="utf-8")
            if self.kind == ".csv":
                return self._read_csv(text)
            if self.kind == ".jsonl":
                whole = text[: text.rfind("\n") + 1]
                rows = [json.loads(line) for line in whole.splitlines() if line.strip()]
                self._cut(text, whole)
            else:
                rows = self.rows = json.loads(text) if text.strip() else []
            if any(list(row["scores"]) != self.names for row in rows):
                raise DataError(f"{self.path} holds scores of other rewards; choose another file")
            return {(row["file"], row["prompt"]) for row in rows}
        except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path} is not a file of scores ({first_line(error)}); choose another") from None

    def _read_parquet(self, content: bytes) -> set[tuple[str, str]]:
        parquet = optional("pyarrow.parquet", self.path.name, DataError)
        try:
            table = parquet.read_table(io.BytesIO(content))
        except OSError as error:  # of a damaged file; the disk itself was read before
            raise ValueError(first_line(error)) from None
        self._check_head(table.column_names)
        self.rows = table.to_pylist()
        return {(row["file"], row["prompt"]) for row in self.rows}

    def _check_head(self, found: Sequence[str]) -> None:
        """Take the columns of parts from the file; raise DataError unless the others are those of this output."""
        some = found[2 + len(self.names) : -1]
        self.parts = [name for name in some if any(name.startswith(f"{reward}/") for reward in self.names)]
        if list(found) != self.head:
            self.parts = []
            has, needs = ", ".join(found), ", ".join(self.head)
            raise DataError(f"{self.path} has the columns {has}, not {needs}; choose another file")

    def _read_csv(self, text: str) -> set[tuple[str, str]]:
        whole = text if text.endswith("\n") else text[: text.rfind("\n") + 1]
        rows = list(csv.reader(io.StringIO(whole)))
        if rows and len(rows[-1]) != len(rows[0]):  # cut inside a quoted cell of several lines
            raise DataError(f"{self.path} ends inside a row; remove its last lines, or choose another file")
        if rows:
            self._check_head(rows[0])
        self._cut(text, whole)
        return {(row[0], row[1]) for row in rows[1:]}

    def _cut(self, text: str, whole: str) -> None:
        if whole != text:
            write_text(self.path, whole)


def _why(row: dict[str, Any]) -> str:
    """Reasons of missing scores in one cell."""
    return "; ".join(f"{name}: {said}" for name, said in row["reasons"].items())


def _cell(value: float | str | None) -> str:
    """A cell of a CSV file: "" for a missing value."""
    return "" if value is None else value if isinstance(value, str) else repr(value)


def _csv_line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
