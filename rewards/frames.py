"""Scores of images -> scores of images and videos, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def by_frame(media: Tensor, score: Callable[[Tensor, Tensor], Tensor], chunk: int, frames: int | None = None) -> Tensor:
    """Scores ``[N]`` of ``media``; a video's is the mean of its frames'.

    Args:
        media: ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` in [0, 1].
        score: ``(images [b, 3, H, W], samples [b]) -> [b]``, where ``samples`` numbers the sample of each image.
        chunk: largest b.
        frames: how many frames of a video count, in the middles of equal stretches; all by default.
    """
    if not len(media):
        return media.new_zeros(0)
    videos = media if media.ndim == 5 else media[:, None]
    chosen = middles(videos.shape[1], frames)
    if len(chosen) < videos.shape[1]:
        videos = videos[:, chosen]
    samples = torch.arange(len(videos)).repeat_interleave(len(chosen))
    parts = zip(videos.flatten(0, 1).split(chunk), samples.split(chunk), strict=True)
    values = torch.cat([score(images, numbers) for images, numbers in parts])
    return values.unflatten(0, (len(videos), len(chosen))).mean(1)


def middles(length: int, count: int | None) -> list[int]:
    """Indices of ``count`` of ``length`` frames, each in the middle of an equal stretch; all where there are no more.

    >>> middles(9, 3), middles(4, 1), middles(2, 5)
    ([1, 4, 7], [2], [0, 1])
    """
    if count is None or count >= length:
        return list(range(length))
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
