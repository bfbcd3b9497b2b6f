"""The folder that ``alignflow pairs`` writes: scored samples as they come, then the table of pairs."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.data.files import check_free, without_nan, write_bytes, write_text, writing
from align.data.media import suffix_of
from align.data.tables import Cell
from align.preference.pairing import Formed
from align.runs.owned import PAIRS, mark, read_mark
from alignflow.errors import DataError, RunFolderError
from alignflow.extras import optional

SCORED, TABLE, MEDIA = "scored.jsonl", "pairs.parquet", "media"

Row = dict[str, Any]
"""A scored sample: ``file`` (relative to the folder, or absolute), ``name`` (as it was given), ``prompt``, ``media``
(other files of the prompt), ``group``, ``score``, ``parts``, ``reasons``, ``unread``."""


class Store:
    """The folder of one command. An interrupted command continues with what it wrote.

    Args:
        folder: new, empty, or of the same command.
        about: everything that the scored samples depend on, as JSON holds it.

    Raises:
        RunFolderError: the folder holds something else, or samples of another command.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / SCORED
        with writing(folder):
            if read_mark(folder).get("kind") == PAIRS:
                self._check_same(about)
            else:
                check_free(folder)
                folder.mkdir(parents=True, exist_ok=True)
                mark(folder, PAIRS, about=about)
            (folder / MEDIA).mkdir(exist_ok=True)
        self.units = self._read()

    def _check_same(self, about: Mapping[str, Any]) -> None:
        before = read_mark(self.folder).get("about")
        now = json.loads(json.dumps(without_nan(dict(about))))
        if before != now:
            keys = [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
            said = ", ".join(keys) or "settings"
            raise RunFolderError(f"{self.folder} holds samples with another {said}; choose another folder with --out")

    def _read(self) -> list[list[Row]]:
        """The rows of every unit that was written whole; a line that was cut off is removed."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        try:
            units = [json.loads(line) for line in whole.splitlines() if line.strip()]
            found = [unit["rows"] for unit in units]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{self.path} is damaged; delete {self.folder} and run the command again") from None
        if whole != text:
            write_text(self.path, whole)
        return found

    def add(self, rows: Sequence[Row]) -> None:
        """Write the rows of the next unit."""
        line = json.dumps({"unit": len(self.units), "rows": without_nan(list(rows))}, ensure_ascii=False)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.units.append(list(rows))

    def write(self, file: str, content: bytes) -> None:
        """Write a file of the folder in one step."""
        write_bytes(self.folder / file, content)

    def keep(self, name: str, content: bytes | Path | None) -> str:
        """A file for the table: one inside a dataset is written to ``media/``, others are named where they are."""
        if isinstance(content, Path):
            return os.path.abspath(content)
        if content is None:
            raise DataError("the cell is empty")
        target = f"{MEDIA}/{name}{suffix_of(content)}"
        self.write(target, content)
        return target

    def keep_inputs(self, number: int, media: Mapping[str, Path | Cell]) -> dict[str, str]:
        """The files that a prompt comes with."""
        found = {name: value.content() if isinstance(value, Cell) else value for name, value in media.items()}
        return {name: self.keep(f"{number:06d}-{name}", content) for name, content in sorted(found.items())}

    @property
    def count(self) -> int:
        """Number of scored samples."""
        return sum(map(len, self.units))

    @property
    def rows(self) -> list[Row]:
        """All scored samples."""
        return [row for unit in self.units for row in unit]

    def write_pairs(self, formed: Formed, about: Mapping[str, Any], *, copy: bool = False) -> Path:
        """Write the table of pairs in one step; its path.

        Args:
            about: further columns, the same in every row.
            copy: copy media from elsewhere into the folder, so that it can be moved.
        """
        rows, copied = self.rows, dict[str, str]()
        if copy:
            for number in sorted({*formed.winner, *formed.loser}):
                for name, file in {"": rows[number]["file"], **rows[number]["media"]}.items():
                    copied.setdefault(file, self._copy(file, f"{number:06d}{'-' + name if name else ''}"))
        table = [{**entry, **about} for entry in records(rows, formed)]
        for entry in table:
            entry |= {name: copied.get(entry[name], entry[name]) for name in MEDIA_COLUMNS if entry.get(name)}
        write_table(self.folder / TABLE, table)
        return self.folder / TABLE

    def _copy(self, file: str, name: str) -> str:
        if not os.path.isabs(file):
            return file
        target = f"{MEDIA}/{name}{Path(file).suffix}"
        with writing(self.folder / target):
            shutil.copyfile(file, self.folder / target)
        return target


MEDIA_COLUMNS = ("chosen", "rejected", "image", "mask")


def records(rows: Sequence[Row], formed: Formed) -> Iterable[Row]:
    """Rows of the table that ``rollout: {kind: pairs}`` and ``reward train`` read.

    Columns are prompt, chosen, rejected, the prompt's other media, chosen_score and rejected_score, the same with
    ``.NAME`` for every part, and in a policy across prompts rejected_prompt and tie.
    """
    names = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    for won, lost, tie in zip(formed.winner, formed.loser, formed.tie, strict=True):
        chosen, rejected = rows[won], rows[lost]
        sides = {"chosen": chosen, "rejected": rejected}
        entry = {"prompt": chosen["prompt"], **{side: row["file"] for side, row in sides.items()}, **chosen["media"]}
        for side, row in sides.items():
            entry[f"{side}_score"] = row["parts"][formed.score] if formed.score else row["score"]
        for name in names:
            entry |= {f"{side}_score.{name}": row["parts"].get(name) for side, row in sides.items()}
        if chosen["group"] != rejected["group"]:
            entry |= {"rejected_prompt": rejected["prompt"], "tie": tie}
        yield entry


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as ``.parquet`` or ``.jsonl`` in one step; the same rows give the same bytes.

    Raises:
        DataError: parquet without the package that writes it.
    """
    if path.suffix == ".jsonl":
        lines = [json.dumps({key: value for key, value in row.items() if value is not None}, ensure_ascii=False)
                 for row in rows]  # fmt: skip
        write_text(path, "\n".join(lines) + "\n")
        return
    needs_parquet()
    pyarrow, parquet = (optional(name, path.name, DataError) for name in ("pyarrow", "pyarrow.parquet"))
    kinds = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    columns, buffer = dict[str, Any](), io.BytesIO()
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        kind = float if "_score" in name else next((type(one) for one in values if one is not None), str)
        columns[name] = pyarrow.array(values, type=kinds[kind])
    parquet.write_table(pyarrow.table(columns), buffer)
    write_bytes(path, buffer.getvalue())


def needs_parquet() -> None:
    """Raise DataError if the packages that write parquet are missing."""
    optional("datasets", "a table of pairs (.parquet)", DataError)
