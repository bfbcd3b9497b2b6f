"""Sampling paths from an engine: the latents around the stochastic steps, as sent and as a trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.maths import samplers
from align.maths.samplers import Trajectory
from align.rollout.engine import boundaries

if TYPE_CHECKING:
    from align.config.sampling import Sampler


def states_of(path: Trajectory) -> Tensor:
    """Latents ``[N, K, ...]`` at the K boundaries of the steps of a trajectory, each once."""
    before = {step: path.x[:, slot] for slot, step in enumerate(path.steps)}
    after = {step + 1: path.x_next[:, slot] for slot, step in enumerate(path.steps)}
    found = after | before
    return torch.stack([found[index] for index in boundaries(path.steps)], 1)


def trajectory(states: Tensor, steps: tuple[int, ...], times: Tensor, sampler: Sampler) -> Trajectory:
    """The trajectory of samples that an engine made. Log-probabilities and means are NaN until they are computed.

    Args:
        states: ``[N, K, ...]`` latents at the boundaries of ``steps``, as :func:`states_of` gives them.
        steps: indices of the S stochastic steps.
        times: ``[T + 1]`` of the sampler's grid.
    """
    place = {index: row for row, index in enumerate(boundaries(steps))}
    x = states[:, [place[step] for step in steps]]
    x_next = states[:, [place[step + 1] for step in steps]]
    index = torch.tensor(steps, device=times.device)
    t, t_next, second = times[index], times[index + 1], float(times[1])
    nothing = torch.zeros(len(steps), 1, device=times.device)
    std = samplers.step(
        sampler.kind, nothing, nothing, t, t_next,
        noise_level=sampler.noise_level or 0.0, t_second=second, x_next=nothing,
    ).std.expand(len(states), -1)  # fmt: skip
    logp = torch.full_like(std, torch.nan)
    mean = torch.full_like(x, torch.nan)
    return Trajectory(x, x_next, mean, logp, std, t, t_next, second, steps)


def arranged(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents of one sample as the generator holds them, in ``shape``; unchanged where no rule fits.

    Args:
        latents: in that shape, ``[C, 1, H, W]`` for ``[C, H, W]``, or the patches ``[H/2 W/2, 4 C]`` into which FLUX
            and Qwen-Image pack ``[C, H, W]``: row by row, each the C channels of 2 x 2 latents.
    """
    if len(shape) == 3 and tuple(latents.shape) == (shape[0], 1, *shape[1:]):
        return latents[:, 0]
    if len(shape) == 3 and tuple(latents.shape) == (shape[1] // 2 * (shape[2] // 2), 4 * shape[0]):
        channels, height, width = shape
        patches = latents.reshape(height // 2, width // 2, channels, 2, 2)
        return patches.permute(2, 0, 3, 1, 4).reshape(shape)
    return latents
