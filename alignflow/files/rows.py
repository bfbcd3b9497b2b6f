"""Lines and rows of text files, one at a time; invalid ones are errors that name the line."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from alignflow.errors import AlignflowError
from alignflow.text import printable

_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.\d{1,30})?(?:[eE][+-]?\d{1,3})?")


class RowError(AlignflowError, ValueError):
    """A line that cannot be read; the message begins with file and line."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is not blank, without its ends.

    Raises:
        RowError: not UTF-8, or the file cannot be read.
    """
    for number, line in _decoded(path):
        if stripped := line.strip():
            yield number, stripped


def place_of(path: Path, number: int) -> str:
    """``set/p.jsonl line 3``, fit for a terminal."""
    return f"{_shown(path)} line {number}"


@lru_cache(maxsize=64)  # asked for with every line
def _shown(path: Path) -> str:
    return printable(path, 300)


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of a JSONL file.

    Raises:
        RowError: not JSON, not an object, a key twice, nested too deeply, or text that is not Unicode.
    """
    for number, line in read_lines(path):
        place = place_of(path, number)
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise RowError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise RowError(f"{place}: nested too deeply to be read") from None
        except ValueError as error:  # a key twice, a number of thousands of digits
            raise RowError(f"{place}: {printable(error, 200)}") from None
        if not isinstance(row, dict):
            raise RowError(f'{place}: expected an object like {{"prompt": "..."}}')
        if "\\ud" in line or "\\uD" in line:  # half of a surrogate pair can only come from an escape
            refuse_surrogates(json.dumps(row, ensure_ascii=False), place)
        yield place, row


def refuse_surrogates(text: str, place: str) -> None:
    """Raise RowError where ``text`` holds half of a surrogate pair, which no tokenizer and no file can take."""
    found = re.search("[\ud800-\udfff]", text)
    if found is not None:
        raise RowError(f"{place}: \\u{ord(found[0]):04x} is half of a character (a lone surrogate); write it whole")


def csv_rows(path: Path, texts: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, column -> value) of every row of a CSV file with a header; empty cells are left out.

    A cell that is written as JSON writes a number is one, but not in the columns ``texts``.

    Raises:
        RowError: quotes that do not close where a cell ends, another number of cells than the header has, a column
            twice or without a name, or text that is not UTF-8.
    """
    kept: list[str] = []
    reader = csv.reader(_kept(path, kept), strict=True)
    header: list[str] = []
    start = 1
    while True:
        kept.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise RowError(f"{place_of(path, start)}: not CSV ({error})") from None
        if cells is None:
            return
        place, start = place_of(path, start), reader.line_num + 1
        if not cells:
            continue
        if not header:
            header = _header(cells, place)
            continue
        _check_cells(cells, header, kept, place)
        yield (
            place,
            {
                name: cell if name in texts else _value(cell)
                for name, cell in zip(header, cells, strict=True)
                if cell
            },
        )  # fmt: skip


def _decoded(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open("rb") as file:
            for raw in file:
                text = raw.decode("utf-8-sig" if number == 0 else "utf-8")
                for line in text.removesuffix("\n").removesuffix("\r").split("\r"):
                    number += 1
                    yield number, line
    except UnicodeDecodeError as error:
        said = f"{printable(path, 300)} is not UTF-8 text ({error.reason} in line {number + 1})"
        raise RowError(said) from None
    except OSError as error:
        raise RowError(f"{printable(path, 300)} cannot be read: {error.strerror or error}") from None


def _kept(path: Path, kept: list[str]) -> Iterator[str]:
    """Lines for the CSV reader, which are noted: a row may take several."""
    for _, line in _decoded(path):
        kept.append(line)
        yield f"{line}\n"


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names:
        raise RowError(f"{place}: column {names.index('') + 1} of the header has no name; name it, or leave it out")
    for name in names:
        if names.count(name) > 1:
            raise RowError(f'{place}: the header has "{printable(name, 80)}" {names.count(name)} times')
    return names


def _check_cells(cells: list[str], header: list[str], lines: list[str], place: str) -> None:
    if len(cells) > len(header):
        raise RowError(f"{place}: more cells than the header has columns; quote cells that hold commas")
    if len(cells) < len(header):
        raise RowError(f"{place}: {len(cells)} cells, and the header has {len(header)} columns")
    if any(re.match(r'\s+"', cell) for cell in cells):
        raise RowError(f"{place}: not CSV (a space before a quote: the quote would be part of the text)")
    # commas of prose are followed by a space, those between cells are not
    if len(lines) > 1 and all(line.count(",") == len(header) - 1 > 0 and ", " not in line for line in lines):
        raise RowError(
            f"{place}: not CSV (a quote that closes {len(lines) - 1} lines further on would join {len(lines)} rows)"
        )


def _value(cell: str) -> Any:
    text = cell.strip()
    if not _NUMBER.fullmatch(text):
        return cell
    value = float(text)
    if not math.isfinite(value):
        return cell
    return int(text) if text.lstrip("-").isdigit() else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'"{printable(twice, 80)}" appears twice')
    return found
