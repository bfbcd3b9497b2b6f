"""Search results as training data: preference pairs, or samples for fine-tuning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.files import new_folder
from align.runs.lock import check_unwritten, locked
from alignflow.errors import ConfigError, DataError
from alignflow.lazy import lazy

if TYPE_CHECKING:
    from align.search.run import read_rows
else:
    read_rows = lazy("align.search.run:read_rows")


Row = dict[str, Any]


def write_pairs(run_dir: Path, folder: Path) -> int:
    """``pairs.jsonl`` of prompt, chosen, rejected, as ``rollout: {kind: pairs}`` reads it: best against worst.

    Prompts whose samples all scored alike are left out. Returns the number of pairs.

    Raises:
        RunFolderError: not a search's folder, or ``folder`` holds something.
        DataError: no prompt has two samples of different reward.
    """

    def pair(row: Row, copy: Callable[[Row, str], str]) -> Row | None:
        kept = row["kept"]
        if len(kept) < 2 or kept[0]["reward"] <= kept[-1]["reward"]:
            return None
        gap = kept[0]["reward"] - kept[-1]["reward"]
        return {"chosen": copy(kept[0], "chosen"), "rejected": copy(kept[-1], "rejected"), "gap": gap}

    return _write(run_dir, folder, "pairs.jsonl", pair)


def write_finetune(run_dir: Path, folder: Path) -> int:
    """``samples.jsonl`` of prompt, sample, reward: the best of every prompt. Returns the number of samples.

    Raises:
        RunFolderError, DataError: as :func:`write_pairs`.
    """

    def best(row: Row, copy: Callable[[Row, str], str]) -> Row | None:
        kept = row["kept"]
        return {"sample": copy(kept[0], "sample"), "reward": kept[0]["reward"]} if kept else None

    return _write(run_dir, folder, "samples.jsonl", best)


WRITERS = {"pairs": write_pairs, "finetune": write_finetune}


def write_as(run_dir: Path, kind: str, folder: Path) -> int:
    """Write the results of ``run_dir`` as ``pairs`` or ``finetune`` into ``folder``."""
    if kind not in WRITERS:
        raise ConfigError(f"--as {kind}: results are written as {' or '.join(WRITERS)}")
    return WRITERS[kind](run_dir, folder)


def _write(
    run_dir: Path, folder: Path, name: str, entry: Callable[[Row, Callable[[Row, str], str]], Row | None]
) -> int:
    check_unwritten(folder, "--as")
    lines = []
    with locked(folder), new_folder(folder) as staging:
        for row in read_rows(run_dir):
            source = run_dir / "candidates" / f"{row['number']:04d}"

            def copy(kept: Row, role: str, source: Path = source, number: int = row["number"]) -> str:
                target = f"{number:04d}-{role}{Path(kept['file']).suffix}"
                shutil.copyfile(source / kept["file"], staging / target)
                return target

            made = entry(row, copy)
            if made is not None:
                lines.append(json.dumps({"prompt": row["prompt"], **row["media"], **made}, ensure_ascii=False))
        if not lines:
            raise DataError(f"{run_dir}: no prompt has what {name} needs: samples with (different) rewards")
        (staging / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
