"""Limits on a single request to a reward server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a request, checked before anything is decoded, and of the queue.

    Args:
        size: bytes of a request, packed and unpacked.
        samples: samples of a request; its images (frames, sources, masks) may be sixteen times as many.
        pixels: height x width of an image or frame.
        total: pixels of all images and frames of a request.
        waiting: requests that may wait to be scored.
        held: bytes that requests may hold while they arrive, are read and wait, all of them together.
        arrival: seconds in which a request must have arrived.
    """

    size: int = 512 << 20
    samples: int = 4096
    pixels: int = 1 << 22
    total: int = 1 << 26
    waiting: int = 256
    held: int = 4 << 30
    arrival: float = 60.0

    @property
    def images(self) -> int:
        """Images and frames of a request."""
        return 16 * self.samples
