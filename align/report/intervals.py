"""95 % confidence intervals of means and of their differences. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.96
_SMALL = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t at 97.5 % with 1 to 15 degrees of freedom."""


def t95(freedom: float | None) -> float:
    """Standard errors on either side of a mean in its 95 % interval; the normal law's where nothing is known.

    Args:
        freedom: degrees of freedom, one less than the number of values.
    """
    if freedom is None or freedom < 1:
        return Z95
    if freedom <= len(_SMALL):
        return _SMALL[math.floor(freedom) - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None]:
    """Standard error of ``mean(second) - mean(first)`` of independent values, and its degrees of freedom (Welch).

    Both are None if one side has fewer than two values; the freedom also where nothing varies.
    """
    errors = standard_error(first), standard_error(second)
    if errors[0] is None or errors[1] is None:
        return None, None
    a, b = errors[0] ** 2, errors[1] ** 2
    parts = a**2 / (len(first) - 1) + b**2 / (len(second) - 1)
    return math.sqrt(a + b), (a + b) ** 2 / parts if parts else None
