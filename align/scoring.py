"""Scores of picture and clip files: what ``alignflow score`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import DataError
from align.inputs import read_inputs
from align.media import read_media
from align.prompts import Prompt, check_media

if TYPE_CHECKING:
    from rewards.base import RewardSettings


def score_files(
    files: Sequence[Path], prompts: Sequence[Prompt], rewards: Mapping[str, RewardSettings], device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row per file: ``file, prompt, scores: {name: value or None}, reasons: {name: why None}``.

    Args:
        files: pictures or clips of any size; what a reward wants beside them is read at the same size.
        prompts: one for all files, or one each.

    Raises:
        DataError: a file that cannot be read, another number of prompts, or a prompt without what a reward wants.
    """
    if len(prompts) not in (1, len(files)):
        raise DataError(f"{len(files)} files and {len(prompts)} prompts: give one prompt for all, or one each")
    asked = list(prompts) * len(files) if len(prompts) == 1 else list(prompts)
    media = [read_media(path).to(device) for path in files]
    rows: list[dict[str, Any]] = [
        {"file": str(path), "prompt": prompt.text, "scores": {}, "reasons": {}}
        for path, prompt in zip(files, asked, strict=True)
    ]
    for name, settings in rewards.items():
        reward = settings.build(device).fixed()
        check_media(prompts, reward.wants, f"reward {reward.name!r}")
        for row, one, prompt in zip(rows, media, asked, strict=True):
            inputs = read_inputs([prompt], reward.wants, (one.shape[-2], one.shape[-1]))
            scores = reward(one[None], [prompt.text], None, inputs)
            value = float(scores.values[0])
            row["scores"][name] = None if np.isnan(value) else value
            if 0 in scores.reasons:
                row["reasons"][name] = scores.reasons[0]
    return rows
