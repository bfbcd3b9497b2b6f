"""All sampling steps from noise (t = 1) to sample (t = 0), with mean, standard deviation and log-probability.

All kinds are one step. With ``x0_hat = x - t v`` and ``eps_hat = x + (1 - t) v`` the step from t to t' is::

    x' = x + (t' - t) v - k eps_hat + S z

the ODE step, less k of the predicted noise, plus fresh noise z of standard deviation S. A kind is a choice of (k, S):

======== ============================================== =============================== ===========================
kind     k                                              S                               source
======== ============================================== =============================== ===========================
flow_sde s^2 (t - t') / (2 t)                           s sqrt(t - t')                  s = a sqrt(t / (1 - t)):
                                                                                        Flow-GRPO, arXiv 2505.05470
dance_sde the same                                      the same                        s = a: DanceGRPO, 2505.07818
cps      t' (1 - E)                                     t' sqrt(1 - E^2)                E = cos(a pi / 2): 2509.05952
ddim     the same                                       the same                        E^2 = 1 - a^2 (1 - q^2)
exact    the same                                       the same                        E = q^(a^2 / 2)
======== ============================================== =============================== ===========================

with a the ``noise_level`` and ``q = t' (1 - t) / (t (1 - t'))``. The last three rebuild
``(1 - t') x0_hat + t' (E eps_hat + sqrt(1 - E^2) z)``: the noise level of x' is right at any step length. ``exact`` is
Flow-SDE's equation solved exactly with x0_hat held over the step (as Precise does, arXiv 2605.23522); DDIM with eta = 1
is its case a = sqrt(2). At a = 0 every kind is the ODE step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.maths.losses import column, mse, precise, x0_from
from align.maths.seeds import derive, whole
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Time = float | Tensor
else:
    torch = lazy("torch")

KINDS = ("ode", "dpm2", "flow_sde", "dance_sde", "cps", "ddim", "exact")
STOCHASTIC = KINDS[2:]


@dataclass(frozen=True)
class Step:
    """One step of N samples.

    Args:
        x: ``[N, ...]`` latents after it.
        mean: ``[N, ...]`` their mean given the latents before it.
        std: ``[N]`` their standard deviation, the same in every dimension; 0 for a step without noise.
        logp: ``[N]`` Gaussian log-density of ``x``, averaged over dimensions, normaliser included; 0 where std is 0.
    """

    x: Tensor
    mean: Tensor
    std: Tensor
    logp: Tensor


@dataclass
class Trajectory:
    """The S stochastic steps of N samples, enough to score them again under another velocity.

    Args:
        x: ``[N, S, ...]`` latents before each step; ``x_next`` after it, exactly as the next step read them.
        mean: ``[N, S, ...]`` of each step under the policy that sampled.
        logp: ``[N, S]``.
        std: ``[N, S]``.
        t: ``[S]`` times before, ``t_next`` after.
        t_second: second time of the grid, what Flow-SDE needs at t = 1.
        steps: indices of the S steps among all steps.
        x0: ``[N, S, ...]`` clean samples predicted at the steps, where they were asked for.
    """

    x: Tensor
    x_next: Tensor
    mean: Tensor
    logp: Tensor
    std: Tensor
    t: Tensor
    t_next: Tensor
    t_second: float
    steps: tuple[int, ...]
    x0: Tensor | None = None


def step(
    kind: str,
    x: Tensor,
    v: Tensor,
    t: Time,
    t_next: Time,
    *,
    noise_level: float = 0.0,
    t_second: float | None = None,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
    previous: tuple[Time, Tensor] | None = None,
) -> Step:
    """Take a step, or score one that was taken.

    The last step (``t_next`` 0) of ``flow_sde`` and ``dance_sde`` adds noise as published, and nothing removes it;
    that of ``cps``, ``ddim`` and ``exact`` adds none. Log-probabilities include the constants that Flow-GRPO drops.

    Args:
        kind: one of :data:`KINDS`.
        x: ``[N, ...]`` latents at ``t``.
        v: ``[N, ...]`` velocity there.
        t: number, ``[]`` or ``[N]``, in (0, 1]; ``t_next`` likewise, in [0, t).
        noise_level: the a of the table: >= 0, at most 1 for cps and ddim. Ignored by ode and dpm2.
        t_second: second time of the grid; stands in for t = 1 in Flow-SDE's s, which is infinite there.
        noise: ``[N, ...]`` standard normal z; a stochastic step needs it or ``x_next``.
        x_next: ``[N, ...]`` latents after the step, to score instead of sampling.
        previous: dpm2's memory: time and ``x0_hat`` of the step before; None at the first.

    Returns:
        gradient flows from ``v`` to ``x`` and ``mean``; ``logp`` takes the latents reached as given, as a policy
        gradient must.

    Raises:
        ValueError: unknown kind, noise_level out of range, no noise to step with, or Flow-SDE at t = 1 without
            ``t_second``.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of step {kind!r}; there are {', '.join(KINDS)}")
    x, v = precise(x), precise(v)
    now, then = _times(t, x), _times(t_next, x)
    if kind in STOCHASTIC:
        mean, std = _stochastic(kind, x, v, now, then, noise_level, t_second)
    else:
        mean, std = _deterministic(kind, x, v, now, then, previous), x.new_zeros(len(x))
    if x_next is None:
        if noise is None and kind in STOCHASTIC:
            raise ValueError(f"a {kind} step needs noise to draw with, or x_next to score")
        x_next = mean if noise is None else mean + column(std, x) * noise.to(x)
    return Step(x_next, mean, std, _log_density(x_next.detach(), mean, std))


def _stochastic(
    kind: str, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: float, t_second: float | None
) -> tuple[Tensor, Tensor]:
    """Mean ``[N, ...]`` and deviation ``[N]`` of the step."""
    removed, added = _noise_exchange(kind, t, t_next, noise_level, t_second)
    mean = column(1 - removed, x) * x + column(t_next - t - removed * (1 - t), x) * v
    return mean, added.to(x.dtype)


def _deterministic(
    kind: str, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, previous: tuple[Time, Tensor] | None
) -> Tensor:
    """Latents after an Euler step, with dpm2's correction from the step before."""
    after = x + column(t_next - t, x) * v
    if kind != "dpm2" or previous is None:
        return after
    before, x0_before = previous
    return after + column(_dpm2_share(_times(before, x), t, t_next), x) * (x0_from(x, v, t) - x0_before)


def _times(t: Time, x: Tensor) -> Tensor:
    """``[N]`` in double precision (single on devices without), so that a batch's shape cannot change a step."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.as_tensor(t, dtype=dtype, device=x.device).expand(x.shape[0])


def _noise_exchange(
    kind: str, t: Tensor, t_next: Tensor, noise_level: float, t_second: float | None
) -> tuple[Tensor, Tensor]:
    """(k, S) of the table, ``[N]`` each."""
    if noise_level < 0 or (noise_level > 1 and kind in ("cps", "ddim")):
        allowed = "in [0, 1]" if kind in ("cps", "ddim") else "at least 0"
        raise ValueError(f"noise_level of {kind} should be {allowed}, given {noise_level}")
    if kind in ("flow_sde", "dance_sde"):
        variance = (
            noise_level**2 * (_flow_odds(t, t_second) if kind == "flow_sde" else torch.ones_like(t)) * (t - t_next)
        )
        return variance / (2 * t), variance.sqrt()
    q = t_next * (1 - t) / (t * (1 - t_next))
    if kind == "cps":
        kept = torch.full_like(t, math.cos(noise_level * math.pi / 2))
    elif kind == "ddim":
        kept = (1 - noise_level**2 * (1 - q.square())).clamp_min(0).sqrt()
    else:
        kept = q ** (noise_level**2 / 2)
    return t_next * (1 - kept), t_next * ((1 - kept) * (1 + kept)).sqrt()


def _flow_odds(t: Tensor, t_second: float | None) -> Tensor:
    """``t / (1 - t)``, at t = 1 with the grid's second time in the denominator."""
    if t_second is None:
        if bool((t >= 1).any()):
            raise ValueError("a flow_sde step from t = 1 needs t_second, the second time of the grid")
        return t / (1 - t)
    return t / (1 - torch.where(t >= 1, t_second, t))


def _dpm2_share(t_before: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """How much of the change in x0_hat since the last step DPM-Solver++(2M) adds (arXiv 2211.01095), ``[N]``.

    In ``lambda = log((1 - t) / t)``, the solver's clock, x0_hat is extrapolated by half a step. Where the clock is
    infinite (after a step from t = 1, in a step to t = 0) the share is 0 and the step of first order, the ODE's.
    Second order inside (0, 1); from t = 1, where the clock starts at infinity, up to a logarithm of the step.
    """

    def clock(time: Tensor) -> Tensor:
        return torch.log((1 - time) / time)

    ratio = (clock(t_next) - clock(t)) / (clock(t) - clock(t_before))
    return (1 - t_next / t) / 2 * torch.nan_to_num(ratio, nan=0.0, posinf=0.0)


def _log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    noisy = std > 0
    width = torch.where(noisy, std, 1.0)
    logp = -mse(x, mean) / (2 * width.square()) - width.log() - math.log(2 * math.pi) / 2
    return torch.where(noisy, logp, 0.0)


# -- whole trajectories -------------------------------------------------------------------------------------------


def window_steps(
    steps: int,
    size: int | None,
    start: tuple[int, int] | None,
    strategy: str,
    iteration: int,
    shift_every: int,
    seed: int,
) -> tuple[int, ...]:
    """The steps out of ``steps`` that are stochastic and trained in this iteration; the same on every process.

    The last step is left out unless ``start`` or ``size`` reaches it: its noise would stay in the sample, and its
    Gaussian is so narrow that log-probabilities lose their meaning (Flow-GRPO and DanceGRPO do not train it either).

    Args:
        size: length of the window; None for strategy "all".
        start: (first, last) step the window may start at, both included; None = anywhere before the last step.
        strategy: "all" = every step but the last; "random" = a window at a uniformly random place (Flow-GRPO-Fast: size
            2 or 3 in the first half); "progressive" = a window that moves on by one every ``shift_every`` iterations
            and returns to the first place after the last (MixGRPO, arXiv 2507.21802).
        seed: of the run; with ``iteration`` it decides the random place.

    Raises:
        ValueError: unknown strategy, or a window that does not fit.
    """
    if strategy == "all":
        return tuple(range(steps - 1))
    if strategy not in ("random", "progressive"):
        raise ValueError(f"unknown window strategy {strategy!r}; there are all, random, progressive")
    if size is None or not 1 <= size <= steps:
        raise ValueError(f"strategy {strategy} needs a size from 1 to {steps}, the number of steps; given {size}")
    first, last = start or (0, max(steps - 1 - size, 0))
    if not 0 <= first <= last <= steps - size:
        raise ValueError(f"a window of {size} in {steps} steps starts in [0, {steps - size}]; given [{first}, {last}]")
    if strategy == "random":
        place = random.Random(derive(seed, "window", iteration)).randint(first, last)
    else:
        place = first + iteration // shift_every % (last - first + 1)
    return tuple(range(place, place + size))


def spaced_steps(count: int, steps: int, seed: int) -> list[int]:
    """``count`` of ``steps`` steps at the largest equal distances, from a random first one (DRTune, 2405.00760).

    >>> spaced_steps(2, 10, 7), spaced_steps(3, 3, 7)
    ([0, 5], [0, 1, 2])
    """
    stride = steps // count
    first = whole(0, steps - 1 - (count - 1) * stride, seed, "spaced")
    return [first + stride * number for number in range(count)]


def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    *,
    kind: str = "ode",
    noise_level: float = 0.0,
    steps: Sequence[int] | None = None,
    noise: Callable[[int], Tensor] | None = None,
    keep: bool = False,
    on_x0: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Trajectory | None]:
    """Integrate from ``times[0]`` to ``times[-1]``. The caller decides whether gradients are kept.

    Args:
        velocity: ``(x [N, ...], t [])`` -> ``v [N, ...]``.
        x: ``[N, ...]`` latents at ``times[0]``.
        times: ``[T + 1]``, falling.
        kind: one of :data:`KINDS`; ``noise_level`` as in :func:`step`.
        steps: indices of the stochastic steps, the others are ODE steps. None = every step but the last of a
            stochastic kind, as strategy "all" of :func:`window_steps`: the last one's noise would stay in the sample.
        noise: step index -> ``[N, ...]`` standard normal.
        keep: return the stochastic steps.
        on_x0: called with (step index, ``x0_hat [N, ...]``) before every step.

    Returns:
        latents ``[N, ...]`` in float32 (float64 if x is), and the trajectory if ``keep``.

    Raises:
        ValueError: as :func:`step`; times that do not fall, step indices that do not exist, nothing to keep.
    """
    chosen = _chosen_steps(kind, len(times) - 1, steps)
    take = stepping(kind, times, noise_level=noise_level, steps=steps, noise=noise)
    if keep and not chosen:
        raise ValueError(f"keep: there is no stochastic step to keep, {kind} takes {len(times) - 1} without noise")
    x = precise(x)
    kept: list[tuple[Tensor, Step]] = []
    for i, t in enumerate(times[:-1]):
        v = velocity(x, t)
        if on_x0 is not None:
            on_x0(i, x0_from(x, v, t))
        taken = take(i, x, v)
        kept += [(x, taken)] if keep and i in chosen else []
        x = taken.x
    return x, _trajectory(kept, times, chosen) if keep else None


def stepping(
    kind: str,
    times: Tensor,
    *,
    noise_level: float = 0.0,
    steps: Sequence[int] | None = None,
    noise: Callable[[int], Tensor] | None = None,
) -> Callable[[int, Tensor, Tensor], Step]:
    """The steps on a grid as a function ``(index, x [N, ...], v [N, ...]) -> Step``.

    It belongs to one pass over the grid, because dpm2 remembers the step before. Arguments and errors are those of
    :func:`sample`.
    """
    chosen = _chosen_steps(kind, len(times) - 1, steps)
    if len(times) < 2 or bool((times.diff() >= 0).any()):
        raise ValueError(f"times should fall, two of them at least; given {times.tolist()}")
    if chosen and noise is None:
        raise ValueError(f"sampling with {kind} needs noise for its stochastic steps")
    second = float(times[1])
    previous: tuple[Time, Tensor] | None = None

    def take(i: int, x: Tensor, v: Tensor) -> Step:
        nonlocal previous
        t, t_next = times[i], times[i + 1]
        if noise is not None and i in chosen:
            return step(kind, x, v, t, t_next, noise_level=noise_level, t_second=second, noise=noise(i))
        if kind != "dpm2":
            return step("ode", x, v, t, t_next)
        taken = step(kind, x, v, t, t_next, previous=previous)
        previous = (t, x0_from(x, v, t))
        return taken

    return take


def _chosen_steps(kind: str, count: int, steps: Sequence[int] | None) -> tuple[int, ...]:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of step {kind!r}; there are {', '.join(KINDS)}")
    if steps is None:
        return tuple(range(count - 1)) if kind in STOCHASTIC else ()
    if steps and kind not in STOCHASTIC:
        raise ValueError(f"{kind} has no stochastic steps, given {list(steps)}; stochastic are {', '.join(STOCHASTIC)}")
    if any(not 0 <= i < count for i in steps):
        raise ValueError(f"stochastic steps should be in [0, {count}), given {list(steps)}")
    return tuple(sorted(set(steps)))


def _trajectory(kept: list[tuple[Tensor, Step]], times: Tensor, steps: tuple[int, ...]) -> Trajectory:
    index = torch.tensor(steps, device=times.device)
    taken = [made for _, made in kept]
    return Trajectory(
        x=torch.stack([x for x, _ in kept], 1),
        x_next=torch.stack([made.x for made in taken], 1),
        mean=torch.stack([made.mean for made in taken], 1),
        logp=torch.stack([made.logp for made in taken], 1),
        std=torch.stack([made.std for made in taken], 1),
        t=times[index],
        t_next=times[index + 1],
        t_second=float(times[1]),
        steps=steps,
    )
