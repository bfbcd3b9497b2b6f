"""Incremental output of scores as CSV, JSONL or JSON, resumed where an earlier run stopped."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from align.data.files import write_text, writing
from alignflow.errors import DataError
from alignflow.text import first_line

EVERY = 5.0
"""Seconds after which a JSON file, which cannot grow by a line, is written anew."""


class Output:
    """A file of rows; :attr:`done` holds (file, prompt) of those that an earlier run wrote.

    Args:
        path: ``.csv``, ``.jsonl`` or ``.json``.
        names: columns of scores.

    Raises:
        DataError: another suffix, or the file holds something else, such as other columns.
        RunFolderError: the disk refuses.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names, self.kind = path, list(names), path.suffix.lower()
        if self.kind not in (".csv", ".jsonl", ".json"):
            raise DataError(f"--out {path}: scores are written as .csv, .jsonl or .json")
        self.head = ["file", "prompt", *self.names, "reasons"]
        self.rows: list[dict[str, Any]] = []
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.done = self._read() if path.exists() else set()
            self.file: IO[str] | None = None if self.kind == ".json" else path.open("a", encoding="utf-8", newline="")
            if self.kind == ".csv" and self.file is not None and not self.file.tell():
                self._line(self.head)
        self.written = time.monotonic()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows of :func:`align.evaluation.files.score_items`."""
        with writing(self.path):
            for row in rows:
                kept = {
                    "file": row["file"],
                    "prompt": row["prompt"],
                    "scores": row["scores"],
                    "reasons": row["reasons"],
                }
                kept |= {"parts": row["parts"]} if row["parts"] else {}
                if self.kind == ".csv":
                    why = "; ".join(f"{name}: {said}" for name, said in row["reasons"].items())
                    scores = ["" if row["scores"][name] is None else repr(row["scores"][name]) for name in self.names]
                    self._line([row["file"], row["prompt"], *scores, why])
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

    def _whole(self) -> None:
        write_text(self.path, json.dumps(self.rows, ensure_ascii=False, indent=2) + "\n")
        self.written = time.monotonic()

    def _line(self, cells: Sequence[str]) -> None:
        assert self.file is not None
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(cells)
        self.file.write(buffer.getvalue())

    def _read(self) -> set[tuple[str, str]]:
        """(file, prompt) of the rows that are there; a last line that was cut off is removed."""
        try:
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

    def _read_csv(self, text: str) -> set[tuple[str, str]]:
        whole = text if text.endswith("\n") else text[: text.rfind("\n") + 1]
        rows = list(csv.reader(io.StringIO(whole)))
        if rows and len(rows[-1]) != len(self.head):  # cut inside a quoted cell of several lines
            raise DataError(f"{self.path} ends inside a row; remove its last lines, or choose another file")
        if rows and rows[0] != self.head:
            has, needs = ", ".join(rows[0]), ", ".join(self.head)
            raise DataError(f"{self.path} has the columns {has}, not {needs}; choose another file")
        self._cut(text, whole)
        return {(row[0], row[1]) for row in rows[1:]}

    def _cut(self, text: str, whole: str) -> None:
        if whole != text:
            write_text(self.path, whole)
