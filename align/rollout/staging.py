"""Trajectories on the CPU: pinned memory and copies that do not wait, where there is a card."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from align.maths.samplers import Trajectory


def on_cpu(path: Trajectory) -> Trajectory:
    """The trajectory with its latents in the CPU's memory, pinned if they come from a card.

    Times, log-probabilities and deviations, one number a step, stay on the device.
    """
    x0 = None if path.x0 is None else _host(path.x0)
    moved = replace(path, x=_host(path.x), x_next=_host(path.x_next), mean=_host(path.mean), x0=x0)
    if path.x.is_cuda:
        torch.cuda.current_stream(path.x.device).synchronize()  # the copies do not wait, and the CPU reads them next
    return moved


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Rows of a trajectory on a device; from the CPU through pinned memory, without waiting."""
    if value.device == device or device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def _host(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)
