"""Held-out scores per prompt, saved with each evaluation beside its row of ``metrics.jsonl``.

``held_out/step-000016.json`` holds one entry per held-out prompt, in the order of the prompts, so that two files of a
run are paired entry by entry. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.data.files import write_json
from alignflow.errors import RunFolderError

FOLDER = "held_out"
KINDS = ("kind", "tag", "category")
"""Columns of a table of prompts that give the kind of a row's prompt; the first of them that a row has counts."""

_NAME = re.compile(r"step-(\d{6,})\.json")


@dataclass(frozen=True)
class PromptScores:
    """One held-out prompt and the scores of its one sample.

    Args:
        prompt: its text.
        seed: what the sample's noise came from.
        scores: reward name -> score, None if there is none.
        reasons: reward name -> why there is no score.
        kind: the kind of prompt, where its table names one (see :data:`KINDS`).
    """

    prompt: str
    seed: int
    scores: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)
    kind: str | None = None


def kind_of(metadata: Mapping[str, Any]) -> str | None:
    """The kind of a prompt as its row's metadata names it, None if it names none."""
    found = (metadata[name] for name in KINDS if metadata.get(name) not in (None, ""))
    value = next(found, None)
    return str(value) if isinstance(value, str | int) else None


def write_scores(run: Path, step: int, role: str, rows: Sequence[PromptScores]) -> Path:
    """Write ``held_out/step-NNNNNN.json`` of a run folder in one step; raises RunFolderError if the disk refuses."""
    path = run / FOLDER / f"step-{step:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"step": step, "role": role, "prompts": [asdict(row) for row in rows]})
    return path


def scored_steps(run: Path) -> list[int]:
    """Steps whose held-out scores a run folder holds prompt by prompt, rising."""
    if not (run / FOLDER).is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in (run / FOLDER).iterdir())
    return sorted(int(match[1]) for match in matches if match)


def read_scores(run: Path, step: int) -> list[PromptScores] | None:
    """The scores of one evaluation prompt by prompt, None if the run kept none (it is older, or not evaluated then).

    Raises:
        RunFolderError: the file is damaged.
    """
    path = run / FOLDER / f"step-{step:06d}.json"
    if not path.is_file():
        return None
    try:
        return [PromptScores(**row) for row in json.loads(path.read_text(encoding="utf-8"))["prompts"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(
            f"{path} is damaged ({type(error).__name__}); delete it; only the details per prompt are lost"
        ) from None


def forget_scores(run: Path, step: int) -> None:
    """Remove the scores of evaluations after ``step``, which a resumed run makes again."""
    for later in scored_steps(run):
        if later > step:
            (run / FOLDER / f"step-{later:06d}.json").unlink()
