"""Images that a reward reads from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alignflow.files.images import ImageError, named, read_image
from alignflow.files.rows import RowError, json_rows
from alignflow.lazy import lazy
from alignflow.paths import expanded, is_file
from rewards.base import RewardError

if TYPE_CHECKING:
    from torch import Tensor

    from alignflow.worlds.shapes.world import dataset
else:
    dataset = lazy("alignflow.worlds.shapes.world:dataset")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
RENDERS = 128


def read_folder(folder: str) -> list[Tensor]:
    """Its images by name, ``[3, H, W]`` in [0, 1] of their own sizes; what is transparent is white.

    Args:
        folder: or ``shapes``: renders of the embedded world's training split.

    Raises:
        RewardError: no such folder, no images in it, or one that cannot be read.
    """
    if folder == "shapes":
        return list(_to_tensor(_renders(RENDERS)[0]))
    path = expanded(folder, RewardError)
    if not path.is_dir():
        raise RewardError(f"references: no folder {folder}")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise RewardError(f"references: {folder} holds no image ({', '.join(SUFFIXES)})")
    return [_to_tensor(_read(file)) for file in files]


def read_table(table: str) -> dict[str, list[Tensor]]:
    """Images of each prompt, ``[3, H, W]`` in [0, 1] of their own sizes.

    Args:
        table: JSON lines with ``prompt`` and ``image``, a file relative to the table; or ``shapes``: renders of the
            embedded world's training split with their captions.

    Raises:
        RewardError: no such table, a row without both, or an image that cannot be read.
    """
    found: dict[str, list[Tensor]] = {}
    if table == "shapes":
        for render, caption in zip(*_renders(RENDERS), strict=True):
            found.setdefault(caption, []).append(_to_tensor(render))
        return found
    path = expanded(table, RewardError)
    if not is_file(path):
        raise RewardError(f"references: {table} cannot be read as a table of prompt and image: there is no such file")
    try:
        for place, row in json_rows(path):
            prompt, image = (row.get(name) for name in ("prompt", "image"))
            if not isinstance(prompt, str) or not isinstance(image, str):
                raise RewardError(f"references: {place} should have a prompt and an image, both text")
            found.setdefault(prompt, []).append(_to_tensor(_read(path.parent / expanded(image, RewardError))))
    except RowError as error:
        raise RewardError(f"references: {error}") from None
    if not found:
        raise RewardError(f"references: {table} has no rows")
    return found


def _renders(count: int) -> tuple[np.ndarray, list[str]]:
    return dataset("train", count, seed=0)


def _read(file: Path) -> np.ndarray:
    try:
        return read_image(file)
    except (ImageError, OSError) as error:
        raise RewardError(f"references: {named(file)} cannot be read: {error}") from None


def _to_tensor(pixels: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(pixels.copy()).movedim(-1, -3).float() / 255
