"""Copies between a card and the CPU that do not wait, through pinned memory. Without a card they are plain copies."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(value: Tensor, *, device: torch.device | None = None) -> Tensor:
    """A copy in the CPU's memory, pinned if ``value`` is, or will be, on a card.

    The copy of a value on a card does not wait: synchronise before the CPU reads it.

    Args:
        device: where the copy will go; None = where ``value`` is.
    """
    pinned = (device or value.device).type == "cuda"
    return torch.empty_like(value, device="cpu", pin_memory=pinned).copy_(value, non_blocking=True)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """The value on a device, itself if it is there; from the CPU through pinned memory."""
    if value.device == device or device.type != "cuda":
        return value.to(device)
    return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)


def synchronise(device: torch.device) -> None:
    """Wait for the copies of :func:`to_host` from a card."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
