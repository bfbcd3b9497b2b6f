"""Calibration: statistics of a reward on a reference sample, so that its scores are comparable everywhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from alignflow.paths import expanded
from alignflow.strict import Strict
from rewards.base import RewardError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT: Literal["alignflow-calibration/1"] = "alignflow-calibration/1"


class Reference(Strict):
    """Statistics of one reward on a reference sample."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["alignflow-calibration/1"] = Field(FORMAT, description="version of the file format")
    reward: dict[str, Any] | None = Field(None, description="settings of the measured reward; null = unknown")
    count: int | None = Field(None, description="number of samples with a score; null = unknown")
    missing: int = Field(0, description="number of samples without a score")
    mean: float = Field(description="mean score")
    std: float = Field(gt=0, description="standard deviation of the scores")
    quantiles: list[float] = Field(
        [], description="scores at equally spaced quantiles, lowest to highest; empty = not measured"
    )

    def standardise(self, values: Tensor) -> Tensor:
        """``(x - mean) / std``."""
        return (values - self.mean) / self.std

    def rank(self, values: Tensor) -> Tensor:
        """Share of the reference sample below each value, linear between quantiles, in [0, 1]; NaN stays.

        The gradient is that of the straight piece a value is on, 0 outside.
        """
        import torch

        knots = torch.tensor(self.quantiles, device=values.device)
        place = torch.searchsorted(knots, values.detach().contiguous(), right=True).clamp(1, len(knots) - 1)
        low, high = knots[place - 1], knots[place]
        inside = ((values - low) / (high - low).clamp_min(torch.finfo(knots.dtype).tiny)).clamp(0, 1)
        return torch.where(values.isfinite(), (place - 1 + inside) / (len(knots) - 1), torch.nan)


def measure(values: Tensor, reward: dict[str, Any], steps: int = 100) -> Reference:
    """Statistics of ``values [N]``, missing ones counted apart.

    Raises:
        RewardError: fewer than two scores, or all equal.
    """
    import torch

    known = values[values.isfinite()].double()
    if len(known) < 2 or float(known.std(correction=0)) == 0:
        said = f"{len(known)} scores" + (", all equal" if len(known) > 1 else "")
        raise RewardError(f"a reference sample needs scores that differ; it has {said}")
    quantiles = torch.quantile(known, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return Reference(
        reward=reward,
        count=len(known),
        missing=len(values) - len(known),
        mean=float(known.mean()),
        std=float(known.std(correction=0)),
        quantiles=quantiles.tolist(),
    )


def load(path: str, reward: dict[str, Any]) -> Reference:
    """Statistics from a file that ``alignflow reward calibrate`` wrote for the same reward settings.

    Raises:
        RewardError: not there, not such a file, or measured of another reward.
    """
    try:
        found = Reference.model_validate(json.loads(expanded(path, RewardError).read_text(encoding="utf-8")))
    except OSError as error:
        raise RewardError(f"calibration {path}: {error.strerror}; make it with alignflow reward calibrate") from None
    except (ValueError, ValidationError) as error:
        said = str(error).splitlines()[0]
        raise RewardError(f"calibration {path} is not a file of format {FORMAT}: {said}") from None
    if found.reward is not None and found.reward != reward:
        raise RewardError(f"calibration {path} was measured of {found.reward}, not of {reward}; measure it again")
    return found
