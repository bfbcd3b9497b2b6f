"""Trajectories on the CPU."""

from __future__ import annotations

from dataclasses import replace

from align.maths.samplers import Trajectory
from generators.pinned import synchronise, to_host


def on_cpu(path: Trajectory) -> Trajectory:
    """The trajectory with its latents in the CPU's memory, pinned if they come from a card.

    Times, log-probabilities and deviations, one number a step, stay on the device.
    """
    x0 = None if path.x0 is None else to_host(path.x0)
    moved = replace(path, x=to_host(path.x), x_next=to_host(path.x_next), mean=to_host(path.mean), x0=x0)
    synchronise(path.x.device)
    return moved
