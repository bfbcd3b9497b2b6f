"""The time grid of a pipeline's own scheduler, without changing that scheduler."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from generators.errors import GeneratorError


def even_sigmas(steps: int) -> Sequence[float]:
    """1, ..., 1/steps: the grid most pipelines hand to their scheduler, which then shifts it."""
    return np.linspace(1.0, 1 / steps, steps).tolist()


def spaced(
    scheduler: Any,
    steps: int,
    sigmas: Sequence[float] | None = None,
    tokens: int | None = None,
    mu: float | None = None,
) -> Tensor:
    """Times ``[steps + 1]`` from 1 (or the scheduler's highest) to 0 as ``scheduler`` spaces them, shift included.

    Args:
        sigmas: grid given to the scheduler before its shift; None = its own.
        tokens: image tokens, for a scheduler whose shift grows with them.
        mu: logarithm of that shift, where the pipeline has a rule of its own.
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
    return told(scheduler, steps, **options).sigmas.float().cpu()


def told(scheduler: Any, steps: int, **options: Any) -> Any:
    """A copy of ``scheduler`` that knows its steps: ``set_timesteps`` would change the pipeline's own."""
    if steps < 1:
        raise GeneratorError(f"{steps} sampling steps: at least 1 is needed")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, **options)
    return scheduler
