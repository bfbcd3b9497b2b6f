"""Requirements of motion rewards on a video, and its optical flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from alignflow.lazy import lazy
from rewards.base import RewardError
from rewards.call import load_object
from rewards.networks.optical_flow import optical_flow

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


Flow: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""``(first, second) [N, 3, H, W] -> [N, 2, H, W]``: where pixels of the first went, in pixels, x right and y down."""


def at_least(media: Tensor, frames: int, who: str) -> Tensor:
    """``media``, a video of so many frames.

    Raises:
        RewardError: images, or too short videos.
    """
    if media.ndim != 5 or media.shape[1] < frames:
        given = f"videos of {media.shape[1]}" if media.ndim == 5 else "images"
        raise RewardError(f"reward {who!r} needs videos of {frames} frames or more, and was given {given}")
    return media


def flow_function(kind: str | None) -> Flow:
    """The built-in optical flow, or a function at ``package.module:name`` or ``path/file.py:name``.

    Raises:
        RewardError: no such function.
    """
    return optical_flow if kind is None else load_object(kind)


def video_flow(videos: Tensor, flow: Flow, chunk: int) -> Tensor:
    """Flow from each frame to the next: ``[N, F, 3, H, W]`` -> ``[N, F - 1, 2, H, W]`` in pixels a frame.

    Raises:
        RewardError: ``flow`` returned another shape.
    """
    first, second = videos[:, :-1].flatten(0, 1), videos[:, 1:].flatten(0, 1)
    found = [flow(a, b) for a, b in zip(first.split(chunk), second.split(chunk), strict=True)]
    fields = torch.cat(found) if found else first[:, :2]
    if fields.shape != first[:, :2].shape:
        raise RewardError(
            f"the flow function returned {list(fields.shape)} for {list(first.shape)}; it should be 2 maps"
        )
    return fields.unflatten(0, (len(videos), videos.shape[1] - 1))
