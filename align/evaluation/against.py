"""Samples of two benchmarks of the same prompts, compared one by one: shares won, tied and lost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.data.inputs import Inputs, take
from align.data.media import read_media
from alignflow.errors import ConfigError, RunFolderError
from rewards.base import Reward

Row = dict[str, Any]
SAMPLES = "samples.jsonl"


def comparing(rewards: Mapping[str, Reward], other: Path | None) -> dict[str, Reward]:
    """The rewards that compare samples of a prompt and give no score to a single one.

    Raises:
        ConfigError: there are some and no other benchmark, or the other way round.
    """
    found = {name: reward for name, reward in rewards.items() if reward.scope != "sample" and not reward.apart}
    if found and other is None:
        raise ConfigError(
            f"evaluate.rewards.{next(iter(found))} compares samples; set --against to the folder of another "
            "benchmark of the same prompts"
        )
    if other is not None and not found:
        raise ConfigError(
            "--against needs a reward that compares samples, such as evaluate.rewards.better.kind=pairwise"
        )
    return found


class OtherSamples:
    """The samples in the folder of another benchmark.

    Raises:
        RunFolderError: it holds none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            lines = (folder / SAMPLES).read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            self.rows = {Path(row["file"]).stem: row for row in rows}
        except (OSError, ValueError, KeyError, TypeError):
            raise RunFolderError(f"{folder} is not the folder of a finished benchmark; --against names one") from None

    def media(self, number: int, copy: int, prompt: str) -> Tensor:
        """Sample ``copy`` of a prompt.

        Raises:
            RunFolderError: it is not there, or of another prompt.
        """
        row = self.rows.get(f"{number:05d}-{copy}")
        if row is None or row["prompt"] != prompt:
            said = "has no such sample" if row is None else f"has it of {row['prompt']!r:.60}"
            raise RunFolderError(
                f"prompt {number}, sample {copy}: {self.folder} {said}; --against names a benchmark of the same set "
                "with as many samples per prompt"
            )
        return read_media(self.folder / row["file"])


def compared(
    media: Tensor, others: Sequence[Tensor], prompts: Sequence[str], inputs: Inputs, rewards: Mapping[str, Reward]
) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Scores by reward of each sample ``[N, ...]`` beside its other, which is alone with it in a group; reasons of NaN.

    Raises:
        RunFolderError: the others have another size.
    """
    for one in others:
        if one.shape != media.shape[1:]:
            sizes = " and ".join("x".join(map(str, shape)) for shape in (tuple(media.shape[1:]), tuple(one.shape)))
            raise RunFolderError(f"samples of {sizes} cannot be compared; sample both benchmarks at one size")
    both = torch.cat([media, torch.stack([one.to(media) for one in others])])
    twice = torch.arange(len(prompts)).repeat(2)
    found: list[tuple[dict[str, float], dict[str, str]]] = [({}, {}) for _ in prompts]
    for name, reward in rewards.items():
        scores = reward(both, [prompts[row] for row in twice], twice, take(inputs, twice))
        for row, (values, reasons) in enumerate(found):
            values[name] = float(scores.values[row])
            if row in scores.reasons:
                reasons[name] = scores.reasons[row]
    return found


def table(rows: Sequence[Row]) -> dict[str, Any]:
    """Shares of samples by reward and category, and of ``all``: won (above 1/2), tied, lost, and won minus lost."""
    found: dict[str, Any] = {}
    for name in rows[0].get("against", ()) if rows else ():
        groups: dict[str, list[float | None]] = {}
        for row in rows:
            groups.setdefault(row["category"], []).append(row["against"][name])
        groups["all"] = [value for values in groups.values() for value in values]
        found[name] = {category: _shares(values) for category, values in groups.items()}
    return found


def _shares(values: Sequence[float | None]) -> Row:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return {"samples": 0, "missing": len(values), "won": None, "tied": None, "lost": None, "net": None}
    won, lost = (sum(sign * (value - 0.5) > 0 for value in known) / len(known) for sign in (1, -1))
    rest = {"won": won, "tied": 1 - won - lost, "lost": lost, "net": won - lost}
    return {"samples": len(known), "missing": len(values) - len(known), **rest}


def lines_of(tables: Mapping[str, Any], other: str) -> list[str]:
    """The shares as tables in Markdown."""
    lines = []
    for name, categories in tables.items():
        lines += ["", f"{name}, against {other}:", "", "| category | samples | won | tied | lost | net |"]
        lines.append("|---|---|---|---|---|---|")
        for category, one in categories.items():
            cells = ["no score" if one[key] is None else f"{one[key]:.3f}" for key in ("won", "tied", "lost", "net")]
            lines.append(f"| {category} | {one['samples']} | {' | '.join(cells)} |")
    return lines
