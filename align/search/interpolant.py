"""SDE sampling of a flow, along its own path or a variance-preserving one: how much noise is renewed.

Paths ``x_r = a(r) x0 + s(r) eps`` differ by a factor and a clock only: with ``t = s / (a + s)`` every point of one is a
point of the other times ``a + s``. An SDE with diffusion coefficient g keeps the share ``exp(-1/2 integral g^2 / s^2)``
of the predicted noise over a step, if x0_hat is held, and renews the rest: the ``cps`` step whose cosine is that share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy("numpy")

BETA_MIN, BETA_MAX = 0.1, 20.0
"""Variance-preserving path, ``a = exp(-(BETA_MAX - BETA_MIN) r^2 / 4 - BETA_MIN r / 2)`` (arXiv 2011.13456)."""
POINTS = 2001


def levels(times: Sequence[float], path: str, diffusion: float) -> list[float]:
    """The ``cps`` level of every step between the flow's ``times [S + 1]``, falling from 1 to 0.

    Args:
        path: ``vp`` or ``linear``.
        diffusion: d of the path's ``g(r) = d r^2``.
    """
    clock = np.interp(times, _flow_times(path, r := np.linspace(0, 1, POINTS)), r)
    return [2 / math.pi * math.acos(_kept(path, diffusion, later, earlier)) for later, earlier in pairwise(clock)]


def slow_start(steps: int, path: str) -> list[float]:
    """Times ``[steps + 1]`` of the flow where the path's clock goes as ``sqrt(1 - (1 - u)^2)``, u in equal steps."""
    times = _flow_times(path, np.sqrt(1 - np.linspace(0, 1, steps + 1) ** 2))
    return [1.0, *times[1:-1].tolist(), 0.0]


def _kept(path: str, diffusion: float, later: float, earlier: float) -> float:
    r = np.linspace(max(earlier, 1e-6), later, POINTS)
    rate = (diffusion * r**2 / _scale_and_spread(path, r)[1]) ** 2
    return math.exp(-np.trapezoid(rate, r) / 2)


def _flow_times(path: str, r: np.ndarray) -> np.ndarray:
    scale, spread = _scale_and_spread(path, r)
    return spread / (scale + spread)


def _scale_and_spread(path: str, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if path == "linear":
        return 1 - r, r
    log_square = -(BETA_MAX - BETA_MIN) * r**2 / 2 - BETA_MIN * r
    return np.exp(log_square / 2), np.sqrt(-np.expm1(log_square))
