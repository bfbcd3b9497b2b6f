"""Sampling as one differentiable function: latents from a velocity field, with gradient through the last steps.

Pure: it depends on no generator and no budget. Search follows a reward's gradient to the noise through it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from align.maths import samplers
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    import torch.utils.checkpoint as checkpoints
    from torch import Tensor

    Velocity = Callable[[Tensor, Tensor], Tensor]
    StepFunction = Callable[[int, Tensor, Tensor], Tensor]
else:
    torch, checkpoints = lazy("torch"), lazy("torch.utils.checkpoint")


def unroll(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    *,
    step: StepFunction | None = None,
    last: int | None = None,
    bridge: Collection[int] | None = None,
    checkpoint: bool = True,
) -> Tensor:
    """Integrate from ``times[0]`` to ``times[-1]``; the last steps carry the graph.

    Args:
        velocity: ``(x [N, ...], t [])`` -> ``v [N, ...]``, with gradient to its parameters, to ``x``, or to both.
        x: ``[N, ...]`` latents at ``times[0]``: noise, or latents part of the way.
        times: ``[S + 1]``, falling.
        step: ``(index, x, v)`` -> latents at ``times[index + 1]``; by default the ODE step. A stochastic step brings
            its own noise.
        last: how many steps carry the graph, counted from the end; None = all. The steps before run without, as if
            their result were detached; with 0 nothing carries a graph.
        bridge: steps whose velocity has a gradient, to its parameters alone, in place of ``last``. Latents are detached
            before the velocity reads them, so gradients go from step to step through ``step`` alone (DRTune, arXiv
            2405.00760): for the ODE a sum.
        checkpoint: keep only the latents between steps and compute each velocity again in the backward pass. Memory is
            then that of one network call, at the cost of a second one per step.

    Returns:
        latents ``[N, ...]`` at ``times[-1]``, in float32 (float64 if x is). With all steps in the graph, gradient
        also flows to ``x``.

    Raises:
        ValueError: times that do not fall, fewer than two, or a negative ``last``.
    """
    _check_steps(times, last)
    count = len(times) - 1
    first = 0 if last is None else max(count - last, 0)
    advance = step or ode_steps(times)
    with torch.no_grad():
        for i in range(first):
            x = advance(i, x, velocity(x, times[i]))
    with torch.enable_grad():
        for i in range(first, count):
            with torch.set_grad_enabled(bridge is None or i in bridge):
                read = x if bridge is None else x.detach()
                if checkpoint and torch.is_grad_enabled():
                    v = checkpoints.checkpoint(velocity, read, times[i], use_reentrant=False)
                else:
                    v = velocity(read, times[i])
            x = advance(i, x, v)
    return x


def _check_steps(times: Tensor, last: int | None) -> None:
    if len(times) < 2 or bool((times.diff() >= 0).any()):
        raise ValueError(f"times should fall, two of them at least; given {times.tolist()}")
    if last is not None and last < 0:
        raise ValueError(f"last should be a number of steps, at least 0; given {last}")


def known_scores(values: Tensor, media: Tensor) -> Tensor:
    """Scores ``[N]`` of media ``[N, ...]`` with 0 for missing ones, which send no gradient to their media.

    Not even NaN: the gradient of a formula that gave NaN is NaN itself, and would spoil whatever rows share, such as
    parameters. Scores are of each row alone.
    """
    known = values.isfinite()
    if media.requires_grad:
        rows = known.reshape(-1, *[1] * (media.ndim - 1))
        media.register_hook(lambda gradient: torch.where(rows.to(gradient.device), gradient, 0))
    return torch.where(known, values, 0)


def ode_steps(times: Tensor) -> StepFunction:
    """The ODE's step on a grid ``[S + 1]``."""
    return lambda i, x, v: samplers.step("ode", x, v, times[i], times[i + 1]).x
