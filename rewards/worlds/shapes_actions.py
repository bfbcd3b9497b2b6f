"""The embedded world's inverse dynamics: the direction in which a video's objects move between frames. No model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from alignflow.worlds.shapes.motion import ACTIONS, DIRECTIONS
from alignflow.worlds.shapes.parse import parse_image
from rewards.worlds.shapes_video import follow

STILL = 0.4  # canvas units, a fifth of a pixel; the first step of a fall goes 0.66, a slow move 1.5
_WAYS = np.array([DIRECTIONS[name] for name in ACTIONS[1:]], float)


def actions(videos: Tensor) -> Tensor:
    """Videos ``[N, F, 3, H, W]`` in [0, 1] -> ``[N, F - 1]`` places in :data:`~alignflow.worlds.shapes.motion.ACTIONS`.

    As ``reward: {kind: inverse_dynamics, model: "rewards.worlds.shapes_actions:actions"}`` takes it.
    """
    pixels = np.moveaxis(videos.detach().float().cpu().clamp(0, 1).numpy(), 2, -1)
    return torch.tensor([[action_of(shift) for shift in shifts(video)] for video in pixels])


def shifts(video: np.ndarray) -> np.ndarray:
    """Mean shift of the objects of a video ``[F, h, w, 3]`` between neighbouring frames, ``[F - 1, 2]``; 0 of none."""
    tracks = follow([parse_image(frame) for frame in video])
    found = np.stack([track.centres() for track in tracks] or [np.full((len(video), 2), np.nan)])
    steps = np.diff(found, axis=1)
    known = ~np.isnan(steps)
    return np.where(known, steps, 0).sum(0) / np.maximum(known.sum(0), 1)


def action_of(shift: np.ndarray) -> int:
    """The direction that a shift goes furthest in, 0 if it is short."""
    along = _WAYS @ shift
    return 1 + int(along.argmax()) if along.max() >= STILL else 0
