"""Images -> the patches of Qwen's vision towers, with gradients to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rewards.base import RewardError
from rewards.networks.preprocess import resized


@dataclass(frozen=True)
class Patches:
    """Equivalent of ``Qwen2VLImageProcessorPil``: Pillow's bicubic to whole patches, normalised, cut into patches.

    Args:
        patch: side of a patch.
        merge: patches a side that become one token.
        depth: times an image is repeated, for towers that read frames in twos.
        fewest, most: pixels an image is shown with.
    """

    patch: int
    merge: int
    depth: int
    fewest: int
    most: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_processor(cls, settings: Any, most: int | None = None) -> Patches:
        """Settings of one of transformers' Qwen image processors; ``most`` lowers its limit of pixels.

        Raises:
            RewardError: ``most`` is less than the model's least.
        """
        fewest, own = settings.size["shortest_edge"], settings.size["longest_edge"]
        if most is not None and most < fewest:
            raise RewardError(f"judge.pixels is {most}, but this model needs at least {fewest} pixels per image")
        return cls(
            settings.patch_size,
            settings.merge_size,
            settings.temporal_patch_size,
            fewest,
            min(own, most or own),
            tuple(settings.image_mean),
            tuple(settings.image_std),
        )

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Patches down and across of ``[3, H, W]``.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        height, width = image.shape[-2:]
        target = smart_resize(height, width, self.patch * self.merge, self.fewest, self.most)
        return target[0] // self.patch, target[1] // self.patch

    def tokens(self, image: Tensor) -> int:
        """Tokens an image takes in a question."""
        down, across = self.grid(image)
        return down * across // self.merge**2

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images ``[3, H, W]`` in [0, 1] -> patches ``[P, 3 * depth * patch^2]``, grids ``[len(images), 3]``."""
        grids = [self.grid(image) for image in images]
        patches = torch.cat([self._cut(*pair) for pair in zip(images, grids, strict=True)])
        return patches, torch.tensor([(1, *grid) for grid in grids], device=patches.device)

    def _cut(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        down, across = grid
        pixels = resized(image.float()[None], (down * self.patch, across * self.patch), eight_bit=True)[0]
        mean, std = (pixels.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        cells = (pixels - mean) / std
        cells = cells.view(3, down // self.merge, self.merge, self.patch, across // self.merge, self.merge, self.patch)
        cells = cells.permute(1, 4, 2, 5, 0, 3, 6)  # merged cells line by line, within each its patches line by line
        return cells.unsqueeze(5).expand(*cells.shape[:5], self.depth, -1, -1).reshape(down * across, -1)
