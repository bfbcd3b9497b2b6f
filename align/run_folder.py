"""The folder a run lives in: created, resumed, written to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from align.errors import ConfigError, RunFolderError
from align.files import explained, without_nan, write_json, write_text
from align.per_prompt import forget_scores

MEMORY_ALONE = (
    "train.micro_batch",
    "train.gradient_checkpointing",
    "rollout.chunk",
    "rollout.decode_chunk",
    *(f"memory.{name}" for name in ("cache_prompts", "offload", "attention", "compile", "vae_tiling", "vae_slicing")),
)
"""Settings that change memory and speed, and results by rounding alone: who ran out of memory goes on with less."""

FREE_ON_RESUME = ("name", "out", "train.steps", "train.threads", "evaluate", "samples", "checkpoint", "trackers")
"""Settings that may change between the parts of one run: they do not alter the sequence of updates."""


class RunFolder:
    """Paths and logs of one run. Only the main process writes.

    Args:
        path: the folder.
        writes: whether this process is the one that writes.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    def check(self, config: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Whether the run may start here: the folder is new, or resumed with the same settings, or to be overwritten.

        Raises:
            RunFolderError: it exists and neither was asked for, or it is not a run, or the settings differ.
        """
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        made_here = all((self.path / name).is_file() for name in ("config.yaml", "environment.json"))
        if not made_here or Path.cwd().is_relative_to(self.path.resolve()):
            raise RunFolderError(f"{self.path} exists and is not a run folder; choose another with --out")
        if resume and not overwrite:
            self._check_same(config)
        elif not overwrite:
            raise RunFolderError(
                f"run folder {self.path} exists; add --resume to go on, --overwrite to start anew, "
                "or --out DIR to keep both"
            )

    def create(self, resolved: str, environment: dict[str, Any], overwrite: bool) -> None:
        """Make the folder, or clean what an interrupted write left in it, and write the resolved config."""
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        within = (".*", "samples/.*", "held_out/.*", "checkpoints/.*")
        for leftover in [path for pattern in within for path in self.path.glob(pattern)]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_text(self.path / "config.yaml", resolved)
        write_json(self.path / "environment.json", environment)

    def _check_same(self, config: dict[str, Any]) -> None:
        before, now = flatten(self._settings()), flatten(config)
        changed = [
            f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and not any(key == free or key.startswith(f"{free}.") for free in (*FREE_ON_RESUME, *MEMORY_ALONE))
        ]
        if changed:
            raise RunFolderError(
                f"{self.path} was made with other settings, so it cannot go on exactly:\n  " + "\n  ".join(changed)
            )

    def _settings(self) -> dict[str, Any]:
        """What the run was made with; settings that came into being since then have their defaults."""
        from align.config import load_config, read_yaml, settings_of

        path = self.path / "config.yaml"
        try:
            return settings_of(load_config(path))
        except ConfigError:  # a setting that is gone since then: shown as different
            return read_yaml(path)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to ``metrics.jsonl``."""
        if self.writes:
            with explained(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(without_nan(row)) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows of ``metrics.jsonl``; a torn last line is left out."""
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def forget_after(self, step: int) -> None:
        """Drop rows a resumed run writes again: training after ``step``, evaluations after ``step``."""
        if self.writes:
            forget_scores(self.path, step)
        if self.writes and self.metrics.is_file():
            kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
            write_text(self.metrics, "".join(kept))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> dotted keys; lists count as values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
