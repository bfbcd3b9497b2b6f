"""Screening of all prompts and their inputs before the first step: lengths, images, masks and stored samples."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.files import write_json
from align.data.inputs import images_of, read_sample
from align.data.prompts import Drawings, Prompt, lacking
from align.data.tables import Cell
from alignflow.errors import DataError

if TYPE_CHECKING:
    from generators.base import Generator

SECONDS = 60.0
"""Seconds of reading before a run that would stop at a bad row begins; the rest is read at the next start."""
WORTH_KEEPING = 1.0
"""Seconds of reading from which on the result is kept for the next start."""
CHUNK = 256
SHOWN = 5
RECORD = "skipped.json"


@dataclass(frozen=True)
class Needs:
    """Inputs that are read of every row.

    Args:
        inputs: images that generator and rewards need, all of one size.
        columns: stored samples.
    """

    inputs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


def screen(
    prompts: Sequence[Prompt], generator: Generator, needs: Needs, seconds: float | None = None
) -> tuple[dict[str, str], int]:
    """Place -> why of the prompts that cannot be used, and how many were looked at within ``seconds`` (None = all).

    What was found is kept by content (texts, and size and time of the files) in the user's cache folder, so that the
    next start continues where this one ended.
    """
    began = time.monotonic()
    store = _cache(prompts, generator, needs)
    bad, done = _kept(store)
    first = done
    while done < len(prompts) and (seconds is None or time.monotonic() - began < seconds):
        some = prompts[done : done + CHUNK]
        found = generator.too_long([prompt.text for prompt in some])
        reached = 0
        for index, prompt in enumerate(some):
            if seconds is not None and time.monotonic() - began > seconds:
                break
            said = found.get(index) or _unusable(prompt, generator, needs)
            if said:
                bad[prompt.place] = said if said.startswith(prompt.where) else f"{prompt.where}: {said}"
            reached += 1
        done += reached
    if done > first and time.monotonic() - began > WORTH_KEEPING:
        _keep(store, bad, done)
    return bad, done


def _unusable(prompt: Prompt, generator: Generator, needs: Needs) -> str:
    if said := lacking(prompt, needs.inputs, generator.pipeline_class):
        return said
    names = [name for name in needs.inputs if name != "metadata" and not _drawn(prompt, name)]
    try:
        images_of(prompt, names)
        for name in needs.columns:
            read_sample(prompt, name, generator.size, getattr(generator, "frames", None))
    except DataError as error:
        return str(error)
    return ""


def _drawn(prompt: Prompt, name: str) -> bool:
    """Whether an image is the embedded world's own."""
    cell = prompt.media[name]
    return isinstance(cell, Cell) and isinstance(cell.column, Drawings)


# -- what a run does with it ------------------------------------------------------------------------------------------


def usable(
    prompts: Sequence[Prompt],
    skipped: Mapping[str, str],
    generator: Generator,
    needs: Needs,
    skip: bool,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Place -> why of the rows to leave out: those ``skipped`` already and those found now; none unless ``skip``.

    Raises:
        DataError: rows that cannot be used, where they are not to be skipped; or no row is left.
    """
    found, reached = screen(prompts, generator, needs, None if skip else SECONDS)
    if reached < len(prompts):
        say(f"{reached} of {len(prompts)} rows checked in {SECONDS:.0f} s; the others are read when a step uses them")
    bad = {**skipped, **found}
    total = len(prompts) + len(skipped)
    if not bad:
        return {}
    shown = "".join(f"\n  {said}" for said in list(bad.values())[:SHOWN])
    shown += f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    if not skip:
        raise DataError(f"{len(bad)} of {total} rows cannot be used; fix them, or set prompts.bad: skip{shown}")
    if len(bad) == total:
        raise DataError(f"none of {total} rows can be used{shown}")
    say(f"{len(bad)} of {total} rows are left out (prompts.bad: skip):{shown}")
    return bad


def recorded(folder: Path, name: str, bad: dict[str, str], going_on: bool) -> dict[str, str]:
    """Rows that were left out when the run began, from its folder; the first start writes them.

    Raises:
        DataError: rows that were used until now cannot be used any more: without them the others would come in
            another order.
    """
    file = folder / RECORD
    try:
        known: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        known = {}
    if not going_on or name not in known:
        if bad or name in known:
            write_json(file, {**known, name: bad})
        return bad
    if new := [said for place, said in bad.items() if place not in known[name]]:
        raise DataError(f"{len(new)} rows could be used when this run began and cannot be now:\n  {new[0]}")
    return known[name]


# -- the cache --------------------------------------------------------------------------------------------------------


def _cache(prompts: Sequence[Prompt], generator: Generator, needs: Needs) -> Path:
    digest = hashlib.sha256()
    options: Any = getattr(generator, "options", None)
    about = (
        1,
        generator.pipeline_class,
        str(options),
        tuple(generator.size),
        getattr(generator, "frames", None),
        needs,
    )
    digest.update(repr(about).encode())
    for prompt in prompts:
        files = [(name, _stamp(source)) for name, source in sorted(prompt.media.items())]
        digest.update(repr((prompt.place, prompt.text, files)).encode("utf-8", "backslashreplace"))
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "alignflow" / "screened" / f"{digest.hexdigest()[:32]}.json"


def _stamp(source: Path | Cell) -> object:
    if isinstance(source, Cell):
        return source.row
    try:
        status = source.stat()
    except OSError:
        return None
    return str(source.absolute()), status.st_size, status.st_mtime_ns


def _kept(store: Path) -> tuple[dict[str, str], int]:
    try:
        found = json.loads(store.read_text(encoding="utf-8"))
        return {str(place): str(said) for place, said in found["bad"].items()}, int(found["done"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, 0


def _keep(store: Path, bad: dict[str, str], done: int) -> None:
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_json(store, {"bad": bad, "done": done})
    except Exception:  # a start without a cache reads everything again
        return
