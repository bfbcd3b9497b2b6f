"""Scores of image files: what ``alignflow score`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import DataError
from align.media import read_image

if TYPE_CHECKING:
    from rewards.base import RewardSettings


def score_images(
    images: Sequence[Path], prompts: Sequence[str], rewards: Mapping[str, RewardSettings], device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row per image: ``image, prompt, scores: {name: value or None}, reasons: {name: why None}``.

    Args:
        images: files of any size.
        prompts: one for all images, or one each.

    Raises:
        DataError: an image that cannot be read, or another number of prompts.
    """
    if len(prompts) not in (1, len(images)):
        raise DataError(f"{len(images)} images and {len(prompts)} prompts: give one prompt for all, or one each")
    texts = list(prompts) * len(images) if len(prompts) == 1 else list(prompts)
    media = [read_image(path).to(device) for path in images]
    rows: list[dict[str, Any]] = [
        {"image": str(path), "prompt": text, "scores": {}, "reasons": {}}
        for path, text in zip(images, texts, strict=True)
    ]
    for name, settings in rewards.items():
        reward = settings.build(device)
        for row, image in zip(rows, media, strict=True):
            scores = reward(image[None], [row["prompt"]])
            value = float(scores.values[0])
            row["scores"][name] = None if np.isnan(value) else value
            if 0 in scores.reasons:
                row["reasons"][name] = scores.reasons[0]
    return rows
