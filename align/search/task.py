"""One batch of prompts under search: the counted, chunked, seeded operations that methods are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align import samplers
from align.errors import SearchError
from align.inputs import Inputs, take
from align.losses import x0_from
from align.samplers import Step
from align.sampling import Sampler
from align.search.budget import Budget, Cost, Meter
from align.search.results import Candidate, Found, between
from align.search.rows import finite, places, slices
from align.seeds import derive
from generators.base import Conditioning, Generator
from rewards.base import Reward
from rewards.guard import latent_loans


class Start(NamedTuple):
    """Particles at their first step: noise ``x [N, ...]``, prompts ``row [N]``, numbers and lineages, N each."""

    x: Tensor
    row: Tensor
    number: list[int]
    lineage: list[tuple[str, ...]]


class Slope(NamedTuple):
    """Rewards ``[N]`` float64 and media on the CPU, gradients ``[N, ...]`` (0 where there is none), what was made."""

    value: Tensor
    slope: Tensor
    latents: Tensor
    rest: Tensor
    media: list[Tensor]


LatentReward = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""``(x_t [n, ...], t [n], prompts) -> [n]``: judges a noised latent without decoding it, with gradient to ``x_t``."""


class Task:
    """B prompts with their budget. A particle is a row of ``[N, ...]``; ``row [N]`` says which prompt it belongs to.

    The particles of a prompt stand side by side, prompts in order. Nothing here depends on the sizes of chunks, nor on
    which prompts are searched together: noise comes from (seed, prompt's number, what it is for, particle).

    Args:
        cond: B rows.
        texts: B prompts; ``numbers`` their places among all prompts; ``inputs`` what they came with.
        chunk: samples per network call; ``decode_chunk`` per decode, per reward call and per gradient.
        keep: best candidates kept of each prompt.
        latent_reward: judges unfinished samples instead of the reward, without a decode.
    """

    def __init__(
        self,
        generator: Generator,
        reward: Reward,
        cond: Conditioning,
        texts: Sequence[str],
        numbers: Sequence[int],
        inputs: Inputs,
        sampler: Sampler,
        budget: Budget,
        seed: int,
        *,
        chunk: int = 64,
        decode_chunk: int = 16,
        keep: int = 4,
        latent_reward: LatentReward | None = None,
    ) -> None:
        self.generator, self.reward, self.cond, self.inputs = generator, reward, cond, inputs
        self.texts, self.numbers, self.sampler, self.seed = list(texts), list(numbers), sampler, seed
        self.chunk, self.decode_chunk, self.keep = chunk, decode_chunk, keep
        self.latent_reward = None if latent_reward is None else latent_loans(latent_reward)
        self.meter = Meter(budget, len(self.texts))
        self.found = [Found(text, number) for text, number in zip(texts, numbers, strict=True)]
        self.times = generator.times(sampler.steps).to(generator.device)
        self.steps = sampler.steps
        self._begun = 0
        self._before = [self.meter.spent(b) for b in range(self.prompts)]
        self.calls = 1 if sampler.guidance == 1.0 else 2
        """Network calls of one velocity."""

    # -- particles and their noise --------------------------------------------------------------------------------

    @property
    def prompts(self) -> int:
        """B."""
        return len(self.texts)

    def rows(self, count: int) -> Tensor:
        """``[B * count]``: ``count`` particles for every prompt."""
        return torch.arange(self.prompts, device=self.generator.device).repeat_interleave(count)

    def noise(self, row: Tensor, *purpose: int | str, number: Sequence[int] | None = None) -> Tensor:
        """Standard normal ``[N, ...]`` for a purpose; a prompt's particles have ``number [N]``, or their place."""
        numbers = places(row) if number is None else number
        prompts = [self.numbers[b] for b in row.tolist()]
        return self.generator.noise(
            [derive(self.seed, "search", p, *purpose, k) for p, k in zip(prompts, numbers, strict=True)]
        )

    def begin(self, count: int) -> Start:
        """``count`` new noises per prompt: the same ones in the same order, whatever method asks."""
        row, number = self.rows(count), list(range(self._begun, self._begun + count)) * self.prompts
        self._begun += count
        return Start(self.noise(row, "start", number=number), row, number, [(f"noise {k}",) for k in number])

    def uniform(self, *purpose: int | str) -> Tensor:
        """One number in [0, 1) per prompt, ``[B]``, float64."""
        seeds = [derive(self.seed, "search", number, *purpose) for number in self.numbers]
        return torch.tensor([seed / 2**63 for seed in seeds], dtype=torch.float64).clamp_max(1 - 2**-53)

    def rounds(self, cost: Cost, wanted: int | None) -> Iterator[tuple[int, int]]:
        """(round, particles per prompt) while one more particle of ``cost`` fits.

        Args:
            wanted: particles per round; None for all that fit.

        Raises:
            SearchError: as :meth:`check`.
        """
        self.check(cost)
        number = 0
        while count := self.meter.affordable(cost, wanted or 2**20):
            yield number, count
            number += 1

    def check(self, cost: Cost) -> None:
        """Raise SearchError where not even one particle of ``cost`` fits and there is no sample yet."""
        if not self.meter.affordable(cost, 1) and not self.found[0].rewards:
            raise SearchError(
                f"a budget of {self.meter.budget} is less than one sample, which takes {cost} by this method; raise "
                "it, or take fewer sampler.steps"
            )

    @property
    def plain(self) -> Cost:
        """What a sample from noise costs."""
        return Cost(self.steps * self.calls, 1, 1)

    # -- the counted operations -----------------------------------------------------------------------------------

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor | float, row: Tensor) -> Tensor:
        """``v [N, ...]`` at ``x``; ``t`` is a number or ``[N]``."""
        self.meter.require(Cost(self.calls), row)
        times = self._times(t, x)
        parts = []
        for some in slices(len(x), self.chunk):
            with self.meter.measured("network_calls", row[some], self.calls):
                parts.append(self._velocity(x[some], times[some], row[some]))
        return torch.cat(parts)

    def step(self, x: Tensor, v: Tensor, i: int, row: Tensor, *purpose: int | str) -> Step:
        """Step ``i`` of the sampler from ``x``, with the noise of that purpose unless it adds none."""
        if not self.noisy(i):
            return samplers.step("ode", x, v, self.times[i], self.times[i + 1])
        noise, level = self.noise(row, *purpose, "step", i), self.sampler.level or 0.0
        second = float(self.times[1])
        t, t_next = self.times[i], self.times[i + 1]
        return samplers.step(self.sampler.kind, x, v, t, t_next, level=level, t_second=second, noise=noise)

    def noisy(self, i: int) -> bool:
        """Whether step ``i`` adds noise: every one of a stochastic sampler but the last, whose noise would stay."""
        return self.sampler.stochastic and i < self.steps - 1

    def sample(
        self,
        x: Tensor,
        row: Tensor,
        *purpose: int | str,
        number: Sequence[int] | None = None,
        first: int = 0,
        last: int | None = None,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """From ``x`` before step ``first`` to the latents before step ``last``, or to finished ones.

        Args:
            purpose: of the noise of stochastic steps; ``number`` as in :meth:`noise`.
            on_step: told (step, x before it, velocity there).
        """
        last = self.steps if last is None else last
        done = first

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            nonlocal done
            v = self.velocity(x, t, row)
            if on_step is not None:
                on_step(done, x, v)
            done += 1
            return v

        return samplers.sample(
            velocity,
            x,
            self.times[first : last + 1],
            kind=self.sampler.kind,
            level=self.sampler.level or 0.0,
            steps=[i - first for i in range(first, last) if self.noisy(i)],
            noise=lambda i: self.noise(row, *purpose, "step", first + i, number=number),
        )[0]

    @torch.no_grad()
    def value(self, x: Tensor, v: Tensor, t: Tensor | float, row: Tensor) -> Tensor:
        """``[N]`` float64 on the CPU: the reward of ``x0_hat``, or the latent reward of ``x``; NaN where missing."""
        if self.latent_reward is None:
            return self._judge(x0_from(x, v, self._times(t, x)), row)[0]
        self.meter.require(Cost(reward_calls=1), row)
        parts = []
        for some in slices(len(x), self.chunk):
            with self.meter.measured("reward_calls", row[some]):
                parts.append(self.latent_reward(x[some], self._times(t, x)[some], self._texts(row[some])))
        return finite(torch.cat(parts))

    @property
    def glance(self) -> Cost:
        """What :meth:`value` costs."""
        return Cost(0, 1, 1) if self.latent_reward is None else Cost(0, 0, 1)

    @torch.no_grad()
    def score(
        self,
        latents: Tensor,
        row: Tensor,
        lineage: Sequence[tuple[str, ...]],
        log_weight: Callable[[Tensor], Tensor] | None = None,
        alone: bool = False,
    ) -> Tensor:
        """Rewards ``[N]`` float64 of finished samples, which become candidates.

        Args:
            lineage: N of them.
            log_weight: rewards ``[N]`` -> ``[N]``.
            alone: each was made by itself, so that what was spent since the last one is shared out among them.
        """
        values, media = self._judge(latents, row, keep_media=True)
        weights = None if log_weight is None else log_weight(values)
        self._offer(values, latents, media, row, lineage, weights, alone)
        return values

    def slope(
        self, x: Tensor, row: Tensor, render: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], cost: Cost
    ) -> Slope:
        """Reward of what is rendered from ``x``, and its gradient to ``x``.

        Args:
            render: ``(x [n, ...], row [n])`` -> (latents to decode, anything ``[n, ...]`` to hand back), with graph.
            cost: network and backward calls of ``render`` for one sample.
        """
        self.meter.require(cost._replace(decodes=1, reward_calls=1), row)
        parts = [self._slope(x[some], row[some], render, cost) for some in slices(len(x), self.decode_chunk)]
        return Slope(
            torch.cat([part.value for part in parts]),
            torch.cat([part.slope for part in parts]),
            torch.cat([part.latents for part in parts]),
            torch.cat([part.rest for part in parts]),
            [one for part in parts for one in part.media],
        )

    def look(self, x: Tensor, t: Tensor | float, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity at ``x``, value of ``x0_hat`` and its gradient to ``x``: ``[N, ...]``, ``[N]``, ``[N, ...]``."""

        def render(x: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            v = self._velocity(x, self._times(t, x), row)
            return x0_from(x, v, self._times(t, x)), v

        found = self.slope(x, row, render, Cost(self.calls, backward_calls=self.calls))
        return found.rest, found.value, found.slope

    @torch.enable_grad()
    def latent_slope(self, x: Tensor, t: Tensor | float, row: Tensor) -> Tensor:
        """Gradient of the latent reward to ``x [N, ...]``, 0 where there is none; costs a reward call."""
        assert self.latent_reward is not None
        self.meter.require(Cost(reward_calls=1), row)
        parts = []
        for some in slices(len(x), self.decode_chunk):
            here = x[some].detach().requires_grad_()
            with self.meter.measured("reward_calls", row[some]):
                values = self.latent_reward(here, self._times(t, x)[some], self._texts(row[some]))
                parts.append(torch.autograd.grad(values.sum(), here)[0].nan_to_num(0.0, 0.0, 0.0))
        return torch.cat(parts)

    @property
    def looking(self) -> Cost:
        """What :meth:`look` costs."""
        return Cost(self.calls, 1, 1, self.calls)

    def climb(self, x: Tensor, row: Tensor, lineage: Sequence[tuple[str, ...]]) -> Tensor:
        """Finish and score noise ``x`` by the ODE; the samples become candidates. The reward's gradient to ``x``."""

        def render(x: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            latents = self._through(x, row)
            return latents, latents

        found = self.slope(x, row, render, self.climbing)
        self._offer(found.value, found.latents, found.media, row, lineage)
        return found.slope

    @property
    def climbing(self) -> Cost:
        """What :meth:`climb` costs: going back, every network call of several is made again."""
        calls = self.steps * self.calls
        return Cost(calls if self.steps == 1 else 2 * calls, 1, 1, calls)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _through(self, x: Tensor, row: Tensor) -> Tensor:
        for t, t_next in pairwise(self.times):
            times = self._times(t, x)
            if self.steps == 1:
                v = self._velocity(x, times, row)
            else:
                v = checkpoint(self._velocity, x, times, row, use_reentrant=False)
            x = samplers.step("ode", x, v, t, t_next).x
        return x

    def _offer(
        self,
        values: Tensor,
        latents: Tensor,
        media: Sequence[Tensor],
        row: Tensor,
        lineage: Sequence[tuple[str, ...]],
        weights: Tensor | None = None,
        alone: bool = False,
    ) -> None:
        """Finished samples become candidates of their prompts."""
        after = [self.meter.spent(b) for b in range(self.prompts)]
        members = row.bincount(minlength=self.prompts).tolist()
        heavy = [math.nan] * len(row) if weights is None else weights.tolist()
        for n, (b, place) in enumerate(zip(row.tolist(), places(row), strict=True)):
            spent = between(self._before[b], after[b], (place + 1) / members[b]) if alone else after[b]
            number = len(self.found[b].rewards)
            one = Candidate(values[n].item(), latents[n].cpu(), media[n], tuple(lineage[n]), number, heavy[n])
            self.found[b].offer(one, spent, self.keep)
        self._before = after

    def _velocity(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        return self.generator.velocity(x, t, self.cond[row], self.sampler.guidance)

    def _times(self, t: Tensor | float, x: Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=self.times.dtype, device=x.device).expand(len(x))

    def _texts(self, row: Tensor) -> list[str]:
        return [self.texts[b] for b in row.tolist()]

    def _rewarded(self, media: Tensor, row: Tensor) -> Tensor:
        rows = row.cpu()
        scores = self.reward(media, self._texts(row), rows, take(self.inputs, rows))
        for index, why in scores.reasons.items():
            found = self.found[int(rows[index])]
            found.reason = found.reason or why
        return scores.values

    def _judge(self, latents: Tensor, row: Tensor, keep_media: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Rewards ``[N]`` and, if asked for, N media on the CPU."""
        self.meter.require(Cost(0, 1, 1), row)
        values: list[Tensor] = []
        kept: list[Tensor] = []
        for some in slices(len(latents), self.decode_chunk):
            with self.meter.measured("decodes", row[some]):
                media = self.generator.decode(latents[some])
            with self.meter.measured("reward_calls", row[some]):
                values.append(self._rewarded(media, row[some]))
            kept += list(media.cpu()) if keep_media else []
        return finite(torch.cat(values)), kept

    @torch.enable_grad()
    def _slope(self, x: Tensor, row: Tensor, render: Any, cost: Cost) -> Slope:
        x = x.detach().requires_grad_()
        with self.meter.measured("network_calls", row, cost.network_calls):
            latents, rest = render(x, row)
        with self.meter.measured("decodes", row):
            media = self.generator.decode(latents)
        with self.meter.measured("reward_calls", row):
            values = self._rewarded(media, row)
        with self.meter.measured("backward_calls", row, cost.backward_calls):
            known = values[values.isfinite()]
            slope = torch.autograd.grad(known.sum(), x)[0] if len(known) else torch.zeros_like(x)
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        return Slope(finite(values), slope, latents.detach(), rest.detach(), list(media.detach().cpu()))
