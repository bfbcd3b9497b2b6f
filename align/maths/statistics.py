"""Mean of scores and its standard error."""

from __future__ import annotations

import math

from torch import Tensor


def mean(values: Tensor) -> float:
    """Mean of ``[N]`` values, NaN if there are none."""
    return float(values.double().mean()) if len(values) else math.nan


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of ``[N]`` values, ``std / sqrt(N)``; NaN for fewer than two."""
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
