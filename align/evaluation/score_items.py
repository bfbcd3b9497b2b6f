"""Inputs of ``alignflow score`` as a stream of items: files, folders, alignflow sample folders and tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.grids import GRID, SHEET, SOURCE
from align.data.prompts import Prompt, prompt_of_row
from align.data.tables import HUB, Cell, read_rows, table_path
from align.data.video import VIDEO
from alignflow.errors import DataError
from alignflow.paths import expanded

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
TABLES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Item:
    """One sample to score.

    Args:
        name: how it is called in the result: the path as given, or table and row.
        source: the file, or image inside a dataset; None where ``error`` says what is wrong with its row.
        prompt: what it is scored for.
    """

    name: str
    source: Path | Cell | None
    prompt: Prompt
    error: str = ""


def items_of(
    paths: Sequence[Path | str], prompts: Sequence[Prompt], say: Callable[[str], None] = lambda line: None
) -> Sequence[Item] | Iterator[Item]:
    """Items of files, folders and tables, in their order.

    Contact sheets of our own sample folders are skipped, and in a folder also the stills of its videos and the sources
    of its edits. A sample folder has its prompts, used if none are given; a table has one per row.

    Args:
        prompts: one for all samples or one each; none if folders or tables have them.
        say: called with a line about skipped files.

    Raises:
        DataError: nothing to score, a folder without images, or another number of prompts.
    """
    tables = [path for path in paths if _is_table(path)]
    if tables:
        if prompts:
            raise DataError(f"{tables[0]} has its prompts in the column prompt; leave out --prompt and --prompts-file")
        return (item for path in paths for item in (_table(str(path)) if _is_table(path) else _alone(path, say)))
    index = _Index()
    files = [file for path in paths for file in _files(Path(path), index, say)]
    if not files:
        raise DataError("there is nothing to score")
    if not prompts:
        found = [index.prompt(file) for file in files]
        if missing := [str(file) for file, text in zip(files, found, strict=True) if text is None]:
            raise DataError(f"{len(files)} files and 0 prompts, the first {missing[0]}: add --prompt or --prompts-file")
        return [Item(str(file), file, Prompt(str(text))) for file, text in zip(files, found, strict=True)]
    if len(prompts) not in (1, len(files)):
        raise DataError(f"{len(files)} files and {len(prompts)} prompts: give one prompt for all, or one each")
    asked = list(prompts) * len(files) if len(prompts) == 1 else prompts
    return [Item(str(file), file, prompt) for file, prompt in zip(files, asked, strict=True)]


def _is_table(path: Path | str) -> bool:
    return str(path).startswith(HUB) or str(path).lower().endswith(TABLES)


def _alone(path: Path | str, say: Callable[[str], None]) -> Sequence[Item] | Iterator[Item]:
    return items_of([path], [], say)


# -- files ------------------------------------------------------------------------------------------------------------


class _Index:
    """Content of the ``prompts.json`` of sample folders; each is read once."""

    def __init__(self) -> None:
        self.known: dict[Path, Mapping[str, Any]] = {}

    def of(self, folder: Path) -> Mapping[str, Any]:
        """The index of a sample folder, empty if the folder is not one."""
        if folder not in self.known:
            try:
                found = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
                ours = isinstance(found, dict) and isinstance(found.get("prompts"), list) and "seeds" in found
            except (OSError, ValueError, RecursionError):
                ours = False
            self.known[folder] = found if ours else {}
        return self.known[folder]

    def prompt(self, file: Path) -> str | None:
        """The prompt of a sample by its number."""
        prompts = self.of(file.parent).get("prompts", [])
        number = int(file.stem) if file.stem.isascii() and file.stem.isdigit() and len(file.stem) < 9 else len(prompts)
        text = prompts[number] if number < len(prompts) else None
        return text if isinstance(text, str) else None


def _files(path: Path, index: _Index, say: Callable[[str], None]) -> Iterator[Path]:
    try:
        path = expanded(str(path))
        inside = path.is_dir()
    except (OSError, ValueError):
        inside = False
    if not inside:
        if path.name == GRID and index.of(_folder(path)):
            say(f"{path} is the contact sheet of a sample folder; skipped")
        else:
            yield path
        return
    count, skipped = 0, 0
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if hidden or file.suffix.lower() not in (*IMAGES, *VIDEO) or not file.is_file():
            continue
        if _beside(file, index):
            skipped += 1
            continue
        count += 1
        yield file
    if skipped:
        say(f"{path}: {skipped} contact sheets, stills of videos and sources of edits skipped")
    if not count:
        raise DataError(f"no images or videos in folder {path}")


def _folder(file: Path) -> Path:
    """The folder that would be the sample folder of a file: its own, or the one around its :data:`SHEET`."""
    return file.parent.parent if file.parent.name == SHEET else file.parent


def _beside(file: Path, index: _Index) -> bool:
    """Whether a file beside the samples of a sample folder is not a sample."""
    about = index.of(_folder(file))
    if not about:
        return False
    still = file.suffix == ".png" and "clips" in about and file.with_suffix(f".{about['clips']}").is_file()
    return file.name == GRID or file.name.endswith(SOURCE) or still


# -- tables -----------------------------------------------------------------------------------------------------------


def _table(source: str) -> Iterator[Item]:
    """Items of a table's rows; a wrong row is an item with an error.

    The sample is the file under ``sample``, or, where there is no such column, under ``image``.
    """
    folder = Path() if source.startswith(HUB) else table_path(source).parent
    for place, row in read_rows(source):
        column = "sample" if row.get("sample") is not None else "image"
        try:
            prompt = prompt_of_row(row, place, folder, {"image", "mask", column}, (column,))
        except DataError as error:
            text = row.get("prompt")
            yield Item(place, None, Prompt(text if isinstance(text, str) else "", place=place), str(error))
            continue
        file = prompt.media[column]
        media = {name: value for name, value in prompt.media.items() if name != column}
        name = f"{place} {file}" if isinstance(file, Path) else place
        yield Item(name, file, Prompt(prompt.text, media, prompt.metadata, place))
