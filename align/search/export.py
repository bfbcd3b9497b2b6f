"""Search results as training data: preference pairs, or samples for fine-tuning."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.files import new_folder
from align.preference.pair_store import records, write_table
from align.preference.pairing import Pairing, form
from align.runs.lock import check_unwritten, locked
from alignflow.errors import ConfigError, DataError
from alignflow.lazy import lazy

if TYPE_CHECKING:
    from align.search.run import read_rows
else:
    read_rows = lazy("align.search.run:read_rows")


Row = dict[str, Any]


def write_pairs(run_dir: Path, folder: Path) -> int:
    """``pairs.jsonl``, as ``rollout: {kind: pairs}`` reads it: the best against the worst of every prompt.

    Prompts whose samples all scored alike are left out. Returns the number of pairs. ``alignflow pairs`` forms pairs by
    other policies and with other rewards.

    Raises:
        RunFolderError: not a search's folder, or ``folder`` holds something.
        DataError: no prompt has two samples of different reward.
    """

    def pairs(found: list[Row], staging: Path) -> list[Row]:
        rows = [sample(row, kept, run_dir) for row in found for kept in row["kept"]]
        formed, how = form(rows, Pairing()), {"policy": "best_worst", "source": str(run_dir)}
        for number, side in [*((n, "chosen") for n in formed.winner), *((n, "rejected") for n in formed.loser)]:
            rows[number]["file"] = copied(rows[number]["file"], staging, f"{rows[number]['group']:04d}-{side}")
            rows[number]["media"] = inputs(rows[number], run_dir, staging)
        return [{**entry, **how} for entry in records(rows, formed)]

    return _write(run_dir, folder, "pairs.jsonl", pairs)


def sample(row: Row, kept: Row, run_dir: Path) -> Row:
    """A candidate that a search kept as a scored sample, see :data:`align.preference.pair_store.Row`."""
    folder = run_dir / "candidates" / f"{row['number']:04d}"
    file, media = folder / kept["file"], {name: str(folder / own) for name, own in row["media"].items()}
    named = {"name": str(file), "file": str(file), "prompt": row["prompt"], "media": media}
    return {**named, "group": row["number"], "score": kept["reward"], "parts": {}, "reasons": {}, "unread": ""}


def write_finetune(run_dir: Path, folder: Path) -> int:
    """``samples.jsonl`` of prompt, sample, reward: the best of every prompt. Returns the number of samples.

    Raises:
        RunFolderError, DataError: as :func:`write_pairs`.
    """

    def best(found: list[Row], staging: Path) -> list[Row]:
        rows = [sample(row, row["kept"][0], run_dir) for row in found if row["kept"]]
        return [
            {
                "prompt": row["prompt"],
                **inputs(row, run_dir, staging),
                "sample": copied(row["file"], staging, f"{row['group']:04d}-sample"),
                "reward": row["score"],
            }
            for row in rows
        ]

    return _write(run_dir, folder, "samples.jsonl", best)


WRITERS = {"pairs": write_pairs, "finetune": write_finetune}


def check_target(run_dir: Path, kind: str, folder: Path) -> None:
    """Whether results can be written, before a search that may take hours.

    Raises:
        ConfigError: no such kind, or ``folder`` is the search's own run folder.
        RunFolderError: ``folder`` holds something.
    """
    if kind not in WRITERS:
        raise ConfigError(f"--as {kind}: results are written as {' or '.join(WRITERS)}")
    if folder.resolve() == run_dir.resolve():
        raise ConfigError(f"--as {kind} {folder}: that is the run folder of the search; choose another folder")
    check_unwritten(folder, "--as")


def write_as(run_dir: Path, kind: str, folder: Path) -> int:
    """Write the results of ``run_dir`` as ``pairs`` or ``finetune`` into ``folder``.

    Raises:
        ConfigError, RunFolderError, DataError: as :func:`check_target` and :func:`write_pairs`.
    """
    check_target(run_dir, kind, folder)
    return WRITERS[kind](run_dir, folder)


def inputs(row: Row, run_dir: Path, staging: Path) -> dict[str, str]:
    """The prompt's images: files where they are, or copies of those that the search kept with its candidates."""
    kept = {name: Path(file).is_relative_to(run_dir / "candidates") for name, file in row["media"].items()}
    return {
        name: copied(file, staging, f"{row['group']:04d}-{name}") if kept[name] else file
        for name, file in row["media"].items()
    }


def copied(file: str, folder: Path, name: str) -> str:
    """Copy a file into the folder; its name there."""
    target = f"{name}{Path(file).suffix}"
    shutil.copyfile(file, folder / target)
    return target


def _write(run_dir: Path, folder: Path, name: str, made: Callable[[list[Row], Path], Sequence[Row]]) -> int:
    check_unwritten(folder, "--as")
    with locked(folder), new_folder(folder) as staging:
        rows = made(read_rows(run_dir), staging)
        if not rows:
            raise DataError(f"{run_dir}: no prompt has samples with (different) rewards, which {name} needs")
        write_table(staging / name, rows)
    return len(rows)
