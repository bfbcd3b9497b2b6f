"""Pairs to compare, and the table of votes: one row of JSON per vote, saved before the vote is acknowledged."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from align.data.files import write_bytes, write_text, writing
from align.data.media import suffix_of
from align.data.prompts import PAIR, Prompt, read_table
from align.data.tables import Cell, read_rows
from align.maths.seeds import derive
from align.runs.lock import Lock
from alignflow.errors import DataError
from alignflow.text import printable

Choice = Literal["left", "right", "tie"]
Media = Path | Cell


@dataclass(frozen=True)
class Candidates:
    """Two samples of one prompt.

    Args:
        prompt: its text; ``media`` holds the inputs of an editor, such as the source image.
        sides: left and right sample.
        key: identity of the pair, the same in every session.
    """

    prompt: Prompt
    sides: tuple[Media, Media]
    key: str


def read_candidates(source: Path, seed: int = 0) -> list[Candidates]:
    """Pairs to compare, of a table or of a folder that ``alignflow sample`` wrote.

    A table has the columns ``prompt``, ``chosen`` and ``rejected``, or ``prompt`` and ``sample``. Samples of the same
    prompt are paired: first with second, third with fourth. The side on which a sample stands is random.

    Raises:
        DataError: the source is missing or unreadable, or no prompt has two samples.
    """
    pairs: list[tuple[Prompt, Media, Media]] = []
    if _paired(source):
        pairs = [(row, row.media["chosen"], row.media["rejected"]) for row in _rows(source, PAIR)]
    else:
        ordered = sorted(_samples(source), key=lambda row: row.text)
        for _, same in groupby(ordered, key=lambda row: row.text):
            rows = list(same)
            pairs += [(a, a.media["sample"], b.media["sample"]) for a, b in zip(rows[::2], rows[1::2], strict=False)]
    if not pairs:
        raise DataError(f"{source}: no prompt has two samples, so there is nothing to compare")
    folder = (source if source.is_dir() else source.parent).resolve()
    return [_sided(prompt, a, b, folder, seed) for prompt, a, b in pairs]


def _paired(source: Path) -> bool:
    if source.is_dir():
        return False
    first = next(read_table(str(source), ()), None)
    return first is not None and "chosen" in first.metadata


def _rows(source: Path, needed: Sequence[str]) -> list[Prompt]:
    return list(read_table(str(source), needed))


def _samples(source: Path) -> list[Prompt]:
    if not source.is_dir():
        return _rows(source, ("sample",))
    try:
        prompts = json.loads((source / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{source} is not a folder that alignflow sample wrote; give a table with prompt and sample"
        ) from None
    moving = {file.stem: file for suffix in ("webp", "gif", "mp4") for file in source.glob(f"*.{suffix}")}
    found = []
    for row, text in enumerate(prompts):
        name = f"{row:03d}"
        found.append(Prompt(str(text), {"sample": moving.get(name, source / f"{name}.png")}, place=f"{source} {name}"))
    return found


def _sided(prompt: Prompt, a: Media, b: Media, folder: Path, seed: int) -> Candidates:
    # names relative to the source, so that votes stay valid when its folder is moved
    names = [f"{one.name} {one.row}" if isinstance(one, Cell) else _relative(one, folder) for one in (a, b)]
    key = blake2b("\x1f".join([prompt.text, *names]).encode("utf-8", "backslashreplace"), digest_size=12).hexdigest()
    sides = (b, a) if derive(seed, "side", key) % 2 else (a, b)
    return Candidates(prompt, sides, key)


def _relative(path: Path, folder: Path) -> str:
    path = path.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


class Votes:
    """The votes of one table; a context that locks it against other servers. Safe to use from several threads.

    A line that an earlier session could not finish is moved to ``<table>.cut``.

    Args:
        path: ``.jsonl``, made where it is missing.
        user: written into every row.
        say: called with a line for the user.
    """

    def __init__(self, path: Path, user: str = "", say: Any = print) -> None:
        if path.suffix.lower() != ".jsonl":
            raise DataError(f"{path}: votes are written as .jsonl, a line each")
        self.path, self.user, self.say = path, user, say
        self.lock, self._turn = Lock(path.with_name(f"{path.name}.lock"), path), threading.Lock()
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> Votes:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock.take()
        try:
            self._mend()
            self.rows = [row for _, row in read_rows(str(self.path))] if self.path.exists() else []
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def _mend(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole, _, cut = content.rpartition(b"\n")
        if cut:
            write_bytes(self.path.with_name(f"{self.path.name}.cut"), cut)
            write_bytes(self.path, whole + b"\n" if whole else b"")
            self.say(f"{self.path}: its last line was incomplete and was moved to {self.path.name}.cut")

    @property
    def voted(self) -> set[str]:
        """Keys of the pairs that this user has voted on."""
        return {row["pair"] for row in self.rows if row.get("user", "") == self.user and "pair" in row}

    def add(self, pair: Candidates, choice: Choice, seconds: float) -> bool:
        """Write a vote; False, and nothing is written, where this user has voted on the pair before.

        Raises:
            RunFolderError: the disk refuses.
        """
        with self._turn:
            if pair.key in self.voted:
                return False
            row = self._row(pair, choice, seconds)
            line = json.dumps(row, ensure_ascii=False) + "\n"
            with writing(self.path), self.path.open("ab") as file:
                file.write(line.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            self.rows.append(row)
            return True

    def undo(self) -> str | None:
        """Remove this user's last vote; the key of its pair, None if there is none."""
        with self._turn:
            last = next((row for row in reversed(self.rows) if row.get("user", "") == self.user), None)
            if last is None or "pair" not in last:
                return None
            kept = [row for row in self.rows if row is not last]
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
            self.rows = kept
            return str(last["pair"])

    def _row(self, pair: Candidates, choice: Choice, seconds: float) -> dict[str, Any]:
        won, lost = (1, 0) if choice == "right" else (0, 1)
        given = pair.prompt.media
        inputs = {name: self._file(given[name], f"{pair.key}-{name}") for name in INPUTS if name in given}
        return {
            "prompt": pair.prompt.text,
            "chosen": self._file(pair.sides[won], f"{pair.key}-{won}"),
            "rejected": self._file(pair.sides[lost], f"{pair.key}-{lost}"),
            "tie": choice == "tie",
            "user": self.user,
            **inputs,
            "pair": pair.key,
            "seconds": round(seconds, 2),
            "time": round(time.time()),
        }

    def _file(self, media: Media, name: str) -> str:
        """Path of a medium relative to the table; one inside a dataset is saved beside the table first."""
        if isinstance(media, Cell):
            content = media.content()
            if isinstance(content, bytes):
                path = self.path.with_name(f"{self.path.stem}-media") / f"{name}{suffix_of(content)}"
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    write_bytes(path, content)
                media = path
            elif content is None:
                raise DataError(f"{printable(name)} is an empty cell")
            else:
                media = content
        return os.path.relpath(media.resolve(), self.path.parent.resolve())


INPUTS = ("image", "mask")
"""Media of a prompt that votes repeat."""
