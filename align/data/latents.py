"""Latents of stored media, encoded once instead of at every step that uses them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from align.data.files import writing
from align.data.media import to_bytes
from generators.base import Generator
from generators.text_cache import TextCache

NAME = "latents"


class Latents:
    """Encodes media, and caches the latents by the content of the pixels.

    Args:
        generator: whose VAE encodes.
        cache: ``none``, ``memory`` (on the CPU) or ``disk``.
        folder: of the files on disk, those of an earlier start included.
        chunk: media encoded at a time where nothing is remembered.
    """

    def __init__(self, generator: Generator, cache: str, folder: Path, chunk: int = 64) -> None:
        self.generator, self.chunk, self.folder = generator, chunk, folder
        self.cache = None if cache == "none" else TextCache(folder if cache == "disk" else None)

    @torch.no_grad()
    def __call__(self, media: Sequence[Tensor]) -> Tensor:
        """Media of one shape in [0, 1] -> latents ``[N, ...]``, float32 on the generator's device.

        Raises:
            RunFolderError: the files cannot be written.
        """
        if self.cache is None:
            return self._encoded(media)
        keys = [key_of(one) for one in media]
        for key, one in zip(keys, media, strict=True):
            if key not in self.cache:
                latents = self._encoded([one]).contiguous()  # alone: batch and layout decide the last digit
                with writing(self.folder):
                    self.cache.add([key], {NAME: latents})
        found = torch.cat([self.cache.rows(key)[NAME] for key in keys])
        return found.to(self.generator.device)

    def _encoded(self, media: Sequence[Tensor]) -> Tensor:
        parts = torch.stack([*media]).split(self.chunk)
        return torch.cat([self.generator.encode_media(part.to(self.generator.device)) for part in parts]).float()


def key_of(media: Tensor) -> str:
    """Digest of the shape and the pixels of one image or video in [0, 1]."""
    pixels = to_bytes(media).cpu().contiguous()
    return hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()
