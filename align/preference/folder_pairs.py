"""Pairs from two folders whose files have the same names: the better samples in one, the worse ones in the other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from align.data.media import size_of
from align.data.prompts import PAIR, Prompt
from align.data.video import VIDEO
from align.evaluation.score_items import IMAGES
from align.preference.pair_store import Row, Store, needs_parquet
from align.preference.pairing import Formed
from align.runs.lock import locked
from alignflow.errors import DataError
from alignflow.paths import expanded
from alignflow.secrets import shown
from alignflow.words import listing

Files = Mapping[str, Path]
"""Path inside the folder, without its suffix -> the file."""


def pair_folders(
    chosen: Path, rejected: Path, prompts: Sequence[Prompt], out: Path, *, copy: bool = False, origin: str = ""
) -> dict[str, Any]:
    """Write ``out/pairs.parquet`` with a pair of every name that both folders have; returns counts.

    Args:
        prompts: one for all, or rows of a table with the name under ``file``; empty = ``NAME.txt`` beside a file.
        copy: copy the files into ``out``.
        origin: text of the column source.

    Returns:
        pairs, ``alone`` (names without a partner), ``unread`` (file and reason of those that cannot be read; they are
        in no pair).

    Raises:
        DataError: a folder is missing or has two files of one name, no name is in both, or a pair has no prompt.
        RunFolderError: ``out`` holds something else.
    """
    needs_parquet()
    sides = {name: media_of(folder) for name, folder in zip(PAIR, (chosen, rejected), strict=True)}
    alone = sorted(sides["chosen"].keys() ^ sides["rejected"].keys())
    both = sorted(sides["chosen"].keys() & sides["rejected"].keys())
    if not both:
        raise DataError(f"{chosen} and {rejected} have no name in common; {_first(sides)}")
    texts = _prompts(both, sides, prompts)
    unread = {str(file): why for name in both for files in sides.values() if (why := _unread(file := files[name]))}
    usable = [name for name in both if not any(str(files[name]) in unread for files in sides.values())]
    if not usable:
        raise DataError(f"none of the {len(both)} pairs can be read, the first: {next(iter(unread.values()))}")
    told = [f"{files[name]}\0{texts[name]}" for name in usable for files in sides.values()]
    digest = hashlib.sha256("\n".join(told).encode()).hexdigest()
    with locked(out):
        store = Store(out, {"source": {"kind": "folders", "pairs": len(usable), "digest": digest}})
        if not store.units:
            store.add([_row(number, files[name], texts[name]) for number, name in enumerate(usable)
                       for files in sides.values()])  # fmt: skip
        winners = [*range(0, 2 * len(usable), 2)]
        formed = Formed(winners, [number + 1 for number in winners], [False] * len(winners), "", {})
        store.write_pairs(formed, {"policy": "folders", "source": origin}, copy=copy)
    return {"pairs": len(usable), "alone": alone, "unread": unread}


def media_of(folder: Path) -> dict[str, Path]:
    """Images and videos of a folder and the folders in it, by their path inside without suffix.

    Raises:
        DataError: there is no such folder, it holds none, or two of one name.
    """
    try:
        folder = expanded(str(folder))
    except ValueError as error:
        raise DataError(f"{folder}: {error}") from None
    if not folder.is_dir():
        raise DataError(f"no folder {folder} (looked in {Path.cwd()})")
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or file.suffix.lower() not in (*IMAGES, *VIDEO):
            continue
        name = inside.with_suffix("").as_posix()
        if name in found:
            raise DataError(f"{found[name]} and {file} have the same name; keep one of them")
        found[name] = file
    if not found:
        raise DataError(f"no images or videos in folder {folder}")
    return found


def _first(sides: Mapping[str, Files]) -> str:
    return ", ".join(f"the first of {side} is {next(iter(files))}" for side, files in sides.items())


def _prompts(names: Sequence[str], sides: Mapping[str, Files], given: Sequence[Prompt]) -> dict[str, str]:
    """Name -> prompt; DataError lists the names without one."""
    if len(given) == 1 and "file" not in given[0].metadata:
        return dict.fromkeys(names, given[0].text)
    if given:
        if nameless := [prompt.where for prompt in given if not isinstance(prompt.metadata.get("file"), str)]:
            raise DataError(f'{nameless[0]}: needs the name of a file under "file", or give one prompt for all')
        texts = {_name(prompt.metadata["file"]): prompt.text for prompt in given}
        remedy = "add rows with file and prompt to the table"
    else:
        texts = {}
        for name in names:
            for files in sides.values():
                if text := _beside(files[name]):
                    texts.setdefault(name, text)
        remedy = "write NAME.txt beside the file, or add --prompt or --prompts-file with the columns file and prompt"
    if missing := [name for name in names if name not in texts]:
        raise DataError(f"{len(missing)} of {len(names)} pairs have no prompt: {listing(missing)}; {remedy}")
    return texts


def _name(file: str) -> str:
    """A table's name of a file, with or without the suffix of its kind."""
    path = PurePath(file)
    return (path.with_suffix("") if path.suffix.lower() in (*IMAGES, *VIDEO) else path).as_posix()


def _beside(file: Path) -> str:
    """The text of ``NAME.txt``; "" if there is none."""
    path = file.with_suffix(".txt")
    try:
        return " ".join(path.read_text(encoding="utf-8").split()) if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None


def _unread(file: Path) -> str:
    try:
        size_of(file)
    except DataError as error:
        return str(error)
    return ""


def _row(group: int, file: Path, prompt: str) -> Row:
    named = {"name": shown(str(file)), "file": str(file.resolve()), "prompt": prompt, "media": {}, "group": group}
    return {**named, "score": None, "parts": {}, "reasons": {}, "unread": ""}
