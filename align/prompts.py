"""Prompts from the embedded world or from files, and which of them a step uses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from align.errors import DataError
from align.seeds import derive

TRAIN_COUNT = 4096
"""Prompts drawn from the embedded world's endless training split."""


def read_prompts(source: str, count: int | None = None, seed: int = 0) -> list[str]:
    """Prompts of ``shapes:train``, ``shapes:heldout``, a ``.txt`` (one a line) or a ``.jsonl`` (key ``prompt``).

    Args:
        count: at most so many; a file's first ones, the world's by ``seed``.

    Raises:
        DataError: missing, empty or unreadable file; names the line.
    """
    if source.startswith("shapes:"):
        from generators.shapes.world import prompts

        split = source.removeprefix("shapes:")
        if split not in ("train", "heldout"):
            raise DataError(f"prompts '{source}': the embedded world has 'shapes:train' and 'shapes:heldout'")
        return prompts(split, count or TRAIN_COUNT, seed)
    return _read_file(Path(source))[:count]


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"prompt file {path} does not exist; give a .txt or .jsonl file, or shapes:train")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"prompt file {path} holds no prompts; write one a line")
    if path.suffix == ".jsonl":
        return [_prompt_of(line, path, number) for number, line in numbered]
    return [line for _, line in numbered]


def _prompt_of(line: str, path: Path, number: int) -> str:
    row = json_object(line, path, number)
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise DataError(f'{path} line {number}: needs a non-empty text under "prompt"')
    return row["prompt"].strip()


def json_object(line: str, path: Path, number: int) -> dict:
    """One line of a JSONL file as a dict. Raises DataError naming file and line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise DataError(f'{path} line {number}: expected an object like {{"prompt": "..."}}')
    return row


def indices_at(step: int, count: int, total: int, seed: int) -> list[int]:
    """Which of ``total`` items a step uses: pass after pass, each freshly shuffled; a function of the step alone."""
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, offset = divmod(position, total)
        chosen.append(int(_shuffle(total, derive(seed, "epoch", epoch))[offset]))
    return chosen


def _shuffle(total: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(total)
