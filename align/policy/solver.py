"""Numerical comparison, once at loading, of the built-in sampler steps with the pipeline's own scheduler.

Both go from the same noise along the same toy flow, whose velocity is known in closed form, on the grid that the
generator would use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align.maths.samplers import sample
from alignflow.text import first_line
from generators.base import Generator
from generators.errors import GeneratorError
from generators.spacing import REMEDY, watched

STEPS = 8
SAME = 1e-3
"""Largest distance, relative to the sample's size, that counts as rounding."""
FAR = 0.5
"""Distance from the flow's own end at which a scheduler follows another process."""
MEAN, SPREAD = 0.6, 0.5


def remark(generator: Generator, kinds: Sequence[str] = ("ode",)) -> str:
    """One line on what stands in for the folder's scheduler; '' where our steps are its own.

    Args:
        kinds: of the sampling steps that will be taken.

    Raises:
        GeneratorError: the scheduler cannot be a flow's; names it.
    """
    with watched() as seen:
        times = generator.times(STEPS)
    if not seen:  # an adapter that has its own rule for the schedulers of its family
        name = type(generator.pipeline.scheduler).__name__
        if not generator.schedulers or name in generator.schedulers:
            return ""
        return f"this folder's {name} is replaced by the steps of its DDIM scheduler; sampler.kind dpm2 may be nearer"
    scheduler, noise = seen[-1], _noise()
    name = type(scheduler).__name__
    theirs = [_theirs(scheduler, noise, seed, sign) for seed in (0, 1) for sign in (1.0, -1.0)]
    if _distance(theirs[0], theirs[2]) > SAME:
        return _stochastic(name, scheduler, times, noise, kinds)
    ours = {kind: sample(_velocity, noise, times.double(), kind=kind)[0] for kind in ("ode", "dpm2")}
    best = min(theirs[:2], key=lambda end: _distance(end, ours["ode"]))
    far = {kind: _distance(best, end) for kind, end in ours.items()}
    if min(far.values()) > FAR or not bool(best.isfinite().all()):
        raise GeneratorError(f"{name} does not step along a flow (velocity, noise levels from 1 to 0): {REMEDY}")
    if far["ode"] <= SAME:  # the folder steps by Euler: another kind of sampler is the config's choice
        return ""
    if all(far.get(kind, far["ode"]) <= SAME for kind in kinds):
        return ""
    share = {kind: f"{100 * value:.2g} %" for kind, value in far.items()}
    if far["dpm2"] <= SAME:
        advice = "sampler.kind dpm2 takes the same steps"
    elif far["dpm2"] < far["ode"] / 2:
        advice = f"sampler.kind dpm2 is nearer ({share['dpm2']})"
    else:
        advice = "with more sampler.steps the two come closer"
    return (
        f"this folder's {name} is replaced by Euler steps on the same time grid ({STEPS} steps of a toy flow end "
        f"{share['ode']} apart); {advice}"
    )


def _stochastic(name: str, scheduler: object, times: Tensor, noise: Tensor, kinds: Sequence[str]) -> str:
    """Remedy for a scheduler that adds fresh noise between steps."""
    fresh = torch.Generator().manual_seed(5)
    draws = [torch.randn(noise.shape, generator=fresh, dtype=torch.float64) for _ in range(STEPS)]
    ours = sample(_velocity, noise, times.double(), kind="cps", noise_level=1.0, noise=draws.__getitem__)[0]
    theirs = [_theirs(scheduler, noise, seed, 1.0) for seed in range(4)]
    alike = abs(float(torch.stack(theirs).std() / ours.std()) - 1) < 0.1
    if alike and "cps" in kinds:
        return ""
    advice = (
        "sampler {kind: cps, noise_level: 1} takes the same steps"
        if alike
        else "stochastic kinds of sampler are nearer"
    )
    return (
        f"this folder's {name} adds fresh noise at every step (LCM, stochastic_sampling) and is replaced by "
        f"deterministic Euler steps; {advice}"
    )


def _noise() -> Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _velocity(x: Tensor, t: Tensor) -> Tensor:
    """``E[eps - x0 | x_t = x]`` where x0 is normal with mean MEAN and deviation SPREAD."""
    keep = 1 - t
    variance = keep**2 * SPREAD**2 + t**2
    away = x - keep * MEAN
    return t / variance * away - (MEAN + keep * SPREAD**2 / variance * away)


def _theirs(scheduler: object, noise: Tensor, seed: int, sign: float) -> Tensor:
    """End of the scheduler's own steps; ``sign`` turns rising levels round."""
    ready = copy.deepcopy(scheduler)
    step: Callable[..., tuple[Tensor, ...]] = ready.step  # type: ignore[attr-defined]
    levels, x = ready.sigmas.double(), noise  # type: ignore[attr-defined]
    rising = bool(levels[0] < levels[-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            for index, timestep in enumerate(ready.timesteps):  # type: ignore[attr-defined]
                level = levels[index]
                v = _velocity(x, 1 - level if rising else level)
                x = step(sign * v, timestep, x, return_dict=False)[0].double()
        except Exception as error:  # a step of another process needs other arguments
            name = type(scheduler).__name__
            raise GeneratorError(f"{name} does not step along a flow: {first_line(error)}; {REMEDY}") from error
    return x


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest difference of two results, relative to the larger's size."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-9))
