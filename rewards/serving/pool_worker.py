"""One actor of a pool: plain arrays in, plain lists out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import rewards
from rewards.digest import identity


class PoolWorker:
    """A reward built from its settings on ``device``."""

    def __init__(self, settings: dict[str, Any], device: str) -> None:
        self.settings = rewards.parse(settings)
        self.reward = self.settings.build(device).fixed()

    def describe(self) -> dict[str, Any]:
        """Properties of the reward that the driver needs."""
        reward = self.reward
        return {
            **{name: getattr(reward, name) for name in ("name", "range", "wants", "scope", "apart")},
            "fingerprint": identity(self.settings, reward),
        }

    def score(
        self, arrays: dict[str, Any], prompts: list[str], group: np.ndarray | None
    ) -> tuple[list[float], dict[int, str], dict[str, list[float]]]:
        """Values, reasons and parts of N samples."""
        inputs = {name: _tensor(value) if isinstance(value, np.ndarray) else value for name, value in arrays.items()}
        media = inputs.pop("media")
        scores = self.reward(media, prompts, None if group is None else _tensor(group), inputs)
        parts = {name: column.tolist() for name, column in scores.parts.items()}
        return scores.values.tolist(), dict(scores.reasons), parts


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy())  # Ray's arrays are read-only
