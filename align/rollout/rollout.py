"""Samples of a step in three stages: requested, generated, scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from align.data.inputs import take
from align.data.media import from_bytes, to_bytes
from align.maths import samplers
from align.maths.samplers import Step, Trajectory
from align.maths.seeds import derive
from alignflow.groups import members
from generators.base import Conditioning, Generator
from generators.noise import seeded_noise
from generators.pinned import to_device
from rewards.base import Scores

if TYPE_CHECKING:
    from align.config.sampling import Sampler
    from align.rollout.unroll import StepFunction

_REMEDY = "try generator.dtype bfloat16 or float32"
OVERFLOW = f"the sample holds NaN or infinity: the network or its VAE overflowed; {_REMEDY}"
Stage = TypeVar("Stage", bound="Asked")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One process's share of a step before sampling: B prompts, G samples each, N = B * G rows.

    Args:
        prompts: ``[N]`` the prompt of every sample.
        group: ``[N]`` number of its prompt, counted over all processes.
        seeds: ``[N]`` the seed from which everything random about a sample comes.
        cond: conditioning of the B local prompts, encoded by the role that samples; ``row [N]`` maps samples to them.
        sampler: settings of sampling; None for stored samples.
        inputs: inputs of the prompts that the reward needs: name -> N of them.
        seed: of what all samples of the rollout share, the same in every process.
        steps: indices of the stochastic steps; None = every step but the last of a stochastic sampler.
    """

    prompts: list[str]
    group: Tensor
    seeds: list[int]
    cond: Conditioning
    row: Tensor
    sampler: Sampler | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: tuple[int, ...] | None = None

    def become(self, stage: type[Stage], **added: Any) -> Stage:
        """The next stage: the fields of this one, and those that ``added`` sets or replaces."""
        return stage(**{**{one.name: getattr(self, one.name) for one in fields(self)}, **added})

    @property
    def guidance(self) -> float:
        """Guidance scale of sampling."""
        return self.sampler.guidance if self.sampler else 1.0

    def cond_of(self, sample: Tensor) -> Conditioning:
        """Conditioning of the samples ``[M]``."""
        return self.cond[self.row[sample]]


@dataclass(frozen=True, kw_only=True)
class Drawn(Asked):
    """The samples.

    Args:
        latents: ``[N, ...]``, float32.
        media: uint8 ``[N, 3, H, W]`` or ``[N, F, 3, H, W]``, on the CPU. Where the loss samples, latents are the
            initial noise, and media are empty until it has.
        trajectory: the stochastic steps, if the recipe needs them.
    """

    latents: Tensor
    media: Tensor
    trajectory: Trajectory | None = None

    @property
    def path(self) -> Trajectory:
        """The trajectory, which a recipe has that needs one."""
        assert self.trajectory is not None
        return self.trajectory

    def noise(self, sample: Tensor, slot: Tensor) -> Tensor:
        """Noise ``[M, ...]`` of the terms (sample, slot), which is the same at every call."""
        seeds = [derive(self.seeds[n], "term", k) for n, k in zip(sample.tolist(), slot.tolist(), strict=True)]
        return seeded_noise(seeds, tuple(self.latents.shape[1:])).to(self.latents.device)

    def course(self, sample: Tensor, generator: Generator, left: int = 1, skip: int = 0) -> tuple[Tensor, StepFunction]:
        """Times of the sampler and its steps for the samples ``[M]``, with the noise of :func:`draw`.

        Args:
            generator: whose times they are.
            left: how many of the last steps are replaced by one to the clean sample predicted there; 1 = none.
            skip: how many of the first steps are left out.
        """
        assert self.sampler is not None
        grid = generator.times(self.sampler.steps).to(self.latents.device)
        seeds, shape = [self.seeds[n] for n in sample.tolist()], tuple(self.latents.shape[1:])
        take = samplers.stepping(
            self.sampler.kind, grid, noise_level=self.sampler.noise_level or 0.0, steps=self.steps,
            noise=lambda i: step_noise(seeds, i, shape).to(self.latents.device),
        )  # fmt: skip
        times = torch.cat([grid[skip : len(grid) - left], grid[-1:]])
        jump, jumps_at = samplers.stepping("ode", times), len(times) - 2 if left > 1 else -1
        return times, lambda i, x, v: (jump(i, x, v) if i == jumps_at else take(i + skip, x, v)).x

    def step(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, x_next: Tensor) -> Step:
        """The sampler's step from ``x`` under the velocity ``v``: mean, std and log-probability of ``x_next``."""
        assert self.sampler is not None
        second, level = self.path.t_second, self.sampler.noise_level or 0.0
        return samplers.step(self.sampler.kind, x, v, t, t_next, noise_level=level, t_second=second, x_next=x_next)

    def at_random_step(self, sample: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points of the terms' samples before one of the sampling steps, chosen uniformly for (sample, slot).

        Every call gives the same. The prediction of the last step is the sample itself.

        Returns:
            latents ``[M, ...]``, times ``[M]`` and predicted clean samples ``[M, ...]``.
        """
        path = self.path
        assert path.x0 is not None
        chosen = [derive(self.seeds[n], "exit", k) for n, k in zip(sample.tolist(), slot.tolist(), strict=True)]
        step = torch.tensor(chosen) % (len(path.t) + 1)  # the step after the stochastic ones adds no noise
        at_end, kept = step == len(path.t), step.clamp_max(len(path.t) - 1)

        def choose(end: Tensor, before: Tensor) -> Tensor:
            end, before = (to_device(value, self.latents.device) for value in (end, before))
            return torch.where(samplers.column(at_end.to(end.device), end).bool(), end, before)

        x = choose(path.x_next[sample, kept], path.x[sample, kept])
        return x, choose(path.t_next[kept], path.t[kept]), choose(self.latents[sample], path.x0[sample, kept])


@dataclass(frozen=True, kw_only=True)
class Scored(Drawn):
    """The samples and their scores.

    Args:
        scores: of the N samples; NaN if a score is missing.
        void: ``[N]`` bool, samples of groups that a filter took out; None = none.
        seen: name -> ``[N, ...]`` results of the recipe's :meth:`~align.recipes.base.Recipe.look`.
    """

    scores: Scores
    void: Tensor | None = None
    seen: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor:
        """``[N]`` whether a sample is trained on: it has a score, and its group is not void."""
        known = self.scores.values.isfinite()
        return known if self.void is None else known & ~self.void


def stochastic_steps(sampler: Sampler, iteration: int, seed: int) -> tuple[int, ...]:
    """Indices of the steps that are stochastic (and trained) in this iteration; none for a deterministic sampler."""
    if sampler.noise_level is None:
        return ()
    window = sampler.window
    return samplers.window_steps(
        sampler.steps, window.size, window.start, window.strategy, iteration, window.shift_every, seed
    )


@torch.no_grad()
def draw(
    generator: Generator,
    cond: Conditioning,
    seeds: Sequence[int],
    sampler: Sampler,
    *,
    row: Tensor | None = None,
    start: Sequence[int] | None = None,
    steps: tuple[int, ...] | None = None,
    keep: bool = False,
    predictions: bool = False,
    chunk: int = 256,
) -> tuple[Tensor, Trajectory | None]:
    """Draw N samples under whatever role is in place.

    Args:
        cond: conditioning of B prompts. Its rows are taken chunk by chunk, never for all N samples at once.
        seeds: ``[N]``; the initial noise and that of every stochastic step come from them alone.
        row: ``[N]`` the row of ``cond`` that a sample has; None = N rows, in order.
        start: ``[N]`` seeds of the initial noise; None = from ``seeds``.
        steps: indices of the stochastic steps; None = every step but the last of a stochastic sampler.
        keep: store the stochastic steps.
        predictions: store the clean sample ``x0_hat`` that each of them predicts, too.
        chunk: samples per network call.

    Returns:
        latents ``[N, ...]`` and the trajectory, None unless kept.
    """
    times = generator.times(sampler.steps).to(generator.device)
    start = [derive(seed, "start") for seed in seeds] if start is None else start
    row = torch.arange(len(seeds)) if row is None else row
    parts = []
    for first in range(0, len(seeds), chunk):
        some = slice(first, min(first + chunk, len(seeds)))
        x = generator.noise(list(start[some]))
        parts.append(
            _draw_chunk(generator, cond[row[some]], x, list(seeds[some]), sampler, times, steps, keep, predictions)
        )
    latents = torch.cat([latents for latents, _ in parts])
    kept = [path for _, path in parts if path is not None]
    return latents, join(kept) if kept else None


def _draw_chunk(
    generator: Generator,
    cond: Conditioning,
    x: Tensor,
    seeds: list[int],
    sampler: Sampler,
    times: Tensor,
    steps: tuple[int, ...] | None,
    keep: bool,
    predictions: bool,
) -> tuple[Tensor, Trajectory | None]:
    predicted: list[Tensor] = []

    def noise(index: int) -> Tensor:
        return step_noise(seeds, index, tuple(x.shape[1:])).to(x.device)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return generator.velocity(x, t, cond, sampler.guidance)

    latents, path = samplers.sample(
        velocity, x, times, kind=sampler.kind, noise_level=sampler.noise_level or 0.0, steps=steps, noise=noise,
        keep=keep,
        on_x0=(lambda _, x0: predicted.append(x0)) if predictions else None,
    )  # fmt: skip
    if path is not None and predictions:
        path.x0 = torch.stack([predicted[i] for i in path.steps], 1)
    return latents, path


def step_noise(seeds: Sequence[int], index: int, shape: tuple[int, ...]) -> Tensor:
    """Noise ``[N, ...]`` of step ``index`` of the samples with these seeds, on the CPU."""
    return seeded_noise([derive(seed, "step", index) for seed in seeds], shape)


def join(paths: Sequence[Trajectory]) -> Trajectory:
    """One trajectory of all samples; the steps are the same in every part."""
    return replace(
        paths[0],
        x=torch.cat([path.x for path in paths]),
        x_next=torch.cat([path.x_next for path in paths]),
        mean=torch.cat([path.mean for path in paths]),
        logp=torch.cat([path.logp for path in paths]),
        std=torch.cat([path.std for path in paths]),
        x0=None if paths[0].x0 is None else torch.cat([path.x0 for path in paths if path.x0 is not None]),
    )


@torch.no_grad()
def decode(generator: Generator, latents: Tensor, chunk: int) -> Tensor:
    """Latents ``[N, ...]`` -> media in [0, 1], ``chunk`` samples at a time.

    Contiguous, because the order in which a reward adds up pixels follows their order in memory.
    """
    return torch.cat([generator.decode(part) for part in latents.split(chunk)]).contiguous()


@torch.no_grad()
def decode_to_cpu(generator: Generator, latents: Tensor, chunk: int) -> tuple[Tensor, dict[int, str]]:
    """Latents ``[N, ...]`` -> uint8 media on the CPU; the card holds the float pixels of ``chunk`` samples at a time.

    Returns:
        media, and the samples that hold NaN or infinity, each with that reason.
    """
    parts: list[Tensor] = []
    lost: dict[int, str] = {}
    for first in range(0, len(latents), chunk):
        media = generator.decode(latents[first : first + chunk])
        lost |= {first + n: OVERFLOW for n, sample in enumerate(media) if not bool(sample.isfinite().all())}
        parts.append(to_bytes(media.nan_to_num()).cpu())
    return torch.cat(parts).contiguous(), lost


def spreads(media: Tensor, group: Tensor) -> Tensor:
    """Root of the mean unbiased pixel variance ``[K]`` of uint8 media inside each group of two samples or more."""
    groups = [rows for rows in members(group) if len(rows) > 1]
    found = [from_bytes(media[rows]).var(dim=0).mean().sqrt() for rows in groups]
    return torch.stack(found) if found else torch.empty(0)


def diversity(media: Tensor, group: Tensor) -> float:
    """Mean of :func:`spreads`, 0 if no group has two samples."""
    found = spreads(media, group)
    return float(found.mean()) if len(found) else 0.0


def of_samples(rollout: Scored, rows: Tensor) -> Scored:
    """The samples ``rows [M]`` of a scored rollout, by index on the CPU."""
    path, scores = rollout.trajectory, rollout.scores
    index = rows.tolist()
    where = {old: new for new, old in enumerate(index)}
    if path is not None:
        per_sample = {name: getattr(path, name)[rows] for name in ("x", "x_next", "mean", "logp", "std")}
        path = replace(path, **per_sample, x0=None if path.x0 is None else path.x0[rows])
    prompts, row = rollout.row[rows].unique(return_inverse=True)
    return replace(
        rollout,
        prompts=[rollout.prompts[n] for n in index],
        group=rollout.group[rows],
        seeds=[rollout.seeds[n] for n in index],
        cond=rollout.cond[prompts],
        row=row,
        inputs=take(rollout.inputs, rows),
        latents=rollout.latents[rows],
        media=rollout.media[rows] if len(rollout.media) else rollout.media,
        trajectory=path,
        scores=Scores(
            scores.values[rows],
            {where[n]: why for n, why in scores.reasons.items() if n in where},
            {name: column[rows] for name, column in scores.parts.items()},
            None if scores.steps is None else scores.steps[rows],
        ),
        void=None if rollout.void is None else rollout.void[rows],
        seen={name: value[rows] for name, value in rollout.seen.items()},
    )


def nothing_asked(sampler: Sampler | None) -> Asked:
    """The share of a process that has no prompt in a step."""
    whole = torch.empty(0, dtype=torch.long)
    return Asked(prompts=[], group=whole, seeds=[], cond=Conditioning({}), row=whole, sampler=sampler)
