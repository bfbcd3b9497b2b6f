"""The time grid of a pipeline's own scheduler, without changing that scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from alignflow.text import first_line
from generators.errors import GeneratorError

REMEDY = "use the scheduler/ folder that was published with the model, or a flow-matching one"


def even_sigmas(steps: int) -> Sequence[float]:
    """1, ..., 1/steps: the grid that most pipelines pass to their scheduler, which then shifts it."""
    return np.linspace(1.0, 1 / steps, steps).tolist()


NOISE = 0.9
"""Least noise level that sampling may start at: below it the noise would not be all."""

_seen: ContextVar[list[Any] | None] = ContextVar("schedulers", default=None)


@contextmanager
def watched() -> Iterator[list[Any]]:
    """Inside the block, :func:`spaced` appends the schedulers that it gave their steps."""
    found: list[Any] = []
    token = _seen.set(found)
    try:
        yield found
    finally:
        _seen.reset(token)


def spaced(
    scheduler: Any,
    steps: int,
    sigmas: Sequence[float] | None = None,
    tokens: int | None = None,
    mu: float | None = None,
    rising: bool = False,
) -> Tensor:
    """Times ``[steps + 1]`` from 1 (or the scheduler's highest) to 0 as ``scheduler`` spaces them, shift included.

    Args:
        sigmas: grid given to the scheduler before its shift; None = its own.
        tokens: image tokens, for a scheduler whose shift grows with them.
        mu: logarithm of that shift, where the pipeline has its own rule.
        rising: this pipeline's noise levels count what is not noise, from 0 to 1.

    Raises:
        GeneratorError: the noise levels are not those of a flow; names the scheduler.
    """
    config = scheduler.config
    options: dict[str, Any] = {}
    if config.get("use_dynamic_shifting") and tokens is not None:
        shape = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
        options["mu"] = calculate_shift(tokens, *(config.get(name, default) for name, default in shape))
    if config.get("use_dynamic_shifting") and mu is not None:
        options["mu"] = mu
    if sigmas is not None and not config.get("use_flow_sigmas"):
        options["sigmas"] = list(sigmas)
    ready = told(scheduler, steps, **options)
    if (seen := _seen.get()) is not None:
        seen.append(ready)
    return _times(ready, rising)


def _times(scheduler: Any, rising: bool) -> Tensor:
    """The noise levels of a scheduler as times; a level that a method visits twice counts once."""
    name = type(scheduler).__name__
    levels = getattr(scheduler, "sigmas", None)
    if levels is None:
        raise GeneratorError(f"{name} has no noise levels, so it does not sample a flow: {REMEDY}")
    levels = torch.unique_consecutive(torch.as_tensor(levels).float().cpu())
    times = 1 - levels if rising else levels
    low, high = float(times.min()), float(times.max())
    if not (low >= -1e-6 and high <= 1 + 1e-3):
        raise GeneratorError(
            f"{name} has noise levels from {low:.3g} to {high:.3g}, but those of a flow are in [0, 1]: {REMEDY}"
        )
    if len(times) < 2 or bool((times.diff() >= 0).any()):
        way = "rise" if len(times) > 1 and bool((times.diff() > 0).all()) else "do not fall from step to step"
        raise GeneratorError(
            f"{name}: its noise levels {way} (invert_sigmas?), this pipeline's fall from 1 to 0: {REMEDY}"
        )
    if high < NOISE or low > 1e-3:
        raise GeneratorError(
            f"{name} goes from noise level {high:.3g} to {low:.3g}, not from noise to a sample (1 to 0): {REMEDY}"
        )
    return times


def told(scheduler: Any, steps: int, **options: Any) -> Any:
    """A copy of ``scheduler`` with its steps set: ``set_timesteps`` would change the pipeline's own.

    Raises:
        GeneratorError: no step, or the scheduler refuses the pipeline's arguments.
    """
    if steps < 1:
        raise GeneratorError(f"{steps} sampling steps: at least 1 is needed")
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, TypeError, RuntimeError, AttributeError, ImportError, IndexError, AssertionError) as error:
        raise GeneratorError(
            f"{type(scheduler).__name__} does not take {steps} steps: {first_line(error)}; {REMEDY}"
        ) from error
    return scheduler
