"""One batch of prompts under search: the counted, chunked operations used by methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from align.config.sampling import Sampler
from align.data.inputs import Inputs
from align.maths import samplers
from align.maths.losses import x0_from
from align.maths.samplers import Step
from align.rollout.unroll import unroll
from align.search.batch import PromptBatch
from align.search.budget import Budget, Cost, Costs, Meter
from align.search.judge import Judge
from align.search.particles import Particles
from align.search.results import Found
from align.search.rows import finite, slices
from alignflow.errors import SearchError
from generators.base import Conditioning, Generator
from rewards.base import Reward
from rewards.guard import latent_loans

LatentReward = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""``(x_t [n, ...], t [n], prompts) -> [n]``: judges a noised latent without decoding it, with gradient to ``x_t``."""


class Task(PromptBatch):
    """B prompts with their budget, and the operations on their particles.

    Nothing here depends on the sizes of chunks, nor on which prompts are searched together.

    Args:
        cond: B rows.
        texts: B prompts; ``numbers`` are their places among all prompts, ``inputs`` their media and metadata.
        chunk: samples per network call; ``decode_chunk`` per decode, per reward call and per gradient.
        keep: number of best candidates to keep per prompt.
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
        super().__init__(generator, texts, numbers, seed)
        self.cond, self.sampler = cond, sampler
        self.latent_reward = None if latent_reward is None else latent_loans(latent_reward)
        self.chunk, self.decode_chunk = chunk, decode_chunk
        self.times, self.steps = generator.times(sampler.steps).to(generator.device), sampler.steps
        self.meter = Meter(budget, self.prompts)
        self.cost = Costs(sampler.steps, 1 if sampler.guidance == 1.0 else 2, latent_reward is not None)
        self.found = [Found(text, number) for text, number in zip(texts, numbers, strict=True)]
        self.judge = Judge(generator, reward, inputs, self.found, self.meter, decode_chunk, keep)

    # -- the budget -----------------------------------------------------------------------------------------------

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
        """Raise SearchError if the budget does not even pay for one particle of ``cost`` and there is no sample yet."""
        if not self.meter.affordable(cost, 1) and not self.found[0].rewards:
            raise SearchError(
                f"a budget of {self.meter.budget} is less than one sample, which takes {cost} by this method; raise "
                "it, or take fewer sampler.steps"
            )

    # -- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def velocity(self, particles: Particles, t: Tensor | float) -> Tensor:
        """``v [N, ...]``; ``t`` is a number or ``[N]``."""
        x, row, times = particles.x, particles.row, self._times(t, particles.x)
        self.meter.require(self.cost.velocity, row)
        parts = []
        for some in slices(len(x), self.chunk):
            with self.meter.measured("network_calls", row[some], self.cost.calls):
                parts.append(self._velocity(x[some], times[some], row[some]))
        return torch.cat(parts)

    def step(self, particles: Particles, i: int, *purpose: int | str) -> Step:
        """Step ``i`` of the sampler with the particles' velocity, and noise of that purpose unless it adds none."""
        x, v, t, t_next = particles.x, particles.v, self.times[i], self.times[i + 1]
        if not self.noisy(i):
            return samplers.step("ode", x, v, t, t_next)
        noise, level = self.noise(particles, *purpose, "step", i), self.sampler.noise_level or 0.0
        second = float(self.times[1])
        return samplers.step(self.sampler.kind, x, v, t, t_next, noise_level=level, t_second=second, noise=noise)

    def noisy(self, i: int) -> bool:
        """Whether step ``i`` adds noise: every one of a stochastic sampler but the last, whose noise would stay."""
        return self.sampler.stochastic and i < self.steps - 1

    def sample(
        self,
        particles: Particles,
        *purpose: int | str,
        first: int = 0,
        last: int | None = None,
        on_step: Callable[[int, Particles], None] | None = None,
    ) -> Particles:
        """From before step ``first`` to the latents before step ``last``, or to finished ones.

        Args:
            purpose: purpose of the noise of stochastic steps.
            on_step: called with (step, particles before it with their velocity).
        """
        last = self.steps if last is None else last
        if first == last:
            return particles
        done = first

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            nonlocal done
            v = self.velocity(particles.moved(x), t)
            if on_step is not None:
                on_step(done, particles.moved(x, v))
            done += 1
            return v

        latents, _ = samplers.sample(
            velocity,
            particles.x,
            self.times[first : last + 1],
            kind=self.sampler.kind,
            noise_level=self.sampler.noise_level or 0.0,
            steps=[i - first for i in range(first, last) if self.noisy(i)],
            noise=lambda i: self.noise(particles, *purpose, "step", first + i),
        )
        return particles.moved(latents)

    def sample_and_value(self, particles: Particles, *purpose: int | str, first: int, last: int) -> Particles:
        """Like :meth:`sample` to before step ``last``, with the values found before the step that led there."""
        before = particles

        def remember(_: int, now: Particles) -> None:
            nonlocal before
            before = now

        reached = self.sample(particles, *purpose, first=first, last=last, on_step=remember)
        return reached.valued(self.value(before, self.times[last - 1]))

    # -- values and gradients -------------------------------------------------------------------------------------

    @torch.no_grad()
    def value(self, particles: Particles, t: Tensor | float) -> Tensor:
        """``[N]`` float64 on the CPU: the reward of ``x0_hat``, or the latent reward of ``x``; NaN where missing."""
        x, v, row, times = particles.x, particles.v, particles.row, self._times(t, particles.x)
        if self.latent_reward is None:
            return self.judge.values(x0_from(x, v, times), row)[0]
        self.meter.require(self.cost.latent_reward, row)
        parts = []
        for some in slices(len(x), self.chunk):
            with self.meter.measured("reward_calls", row[some]):
                parts.append(self.latent_reward(x[some], times[some], self.judge.texts(row[some])))
        return finite(torch.cat(parts))

    @torch.no_grad()
    def score(
        self, particles: Particles, log_weight: Callable[[Tensor], Tensor] | None = None, alone: bool = False
    ) -> Tensor:
        """Rewards ``[N]`` float64 of finished samples, which become candidates.

        Args:
            log_weight: rewards ``[N]`` -> ``[N]``.
            alone: each sample was made by itself; the cost since the last call is divided among them.
        """
        values, media = self.judge.values(particles.x, particles.row, keep_media=True)
        weights = None if log_weight is None else log_weight(values)
        self.judge.offer(particles, values, media, weights, alone)
        return values

    def value_and_grad(self, particles: Particles, t: Tensor | float) -> Particles:
        """With their velocity, the reward of ``x0_hat`` as value, and its gradient to ``x`` through the network."""

        def render(x: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            v = self._velocity(x, self._times(t, x), row)
            return x0_from(x, v, self._times(t, x)), v

        return self.judge.values_and_grad(particles, render, Cost(self.cost.calls, backward_calls=self.cost.calls))[0]

    def reward_grad(self, particles: Particles) -> Particles:
        """With the reward of ``x`` itself as value, decoded as it stands, and its gradient to ``x``."""
        return self.judge.values_and_grad(particles, lambda x, _: (x, None), Cost())[0]

    def reward_grad_through_ode(self, particles: Particles) -> Tensor:
        """Finish noise by the ODE and score it; the samples become candidates. The reward's gradient to the noise."""

        def render(x: Tensor, row: Tensor) -> tuple[Tensor, None]:
            def velocity(x: Tensor, t: Tensor) -> Tensor:
                return self._velocity(x, self._times(t, x), row)

            return unroll(velocity, x, self.times, checkpoint=self.steps > 1), None

        cost = replace(self.cost.reward_grad_through_ode, decodes=0, reward_calls=0)
        found, latents, media = self.judge.values_and_grad(particles, render, cost)
        self.judge.offer(particles.moved(latents), found.value, media)
        return found.grad

    @torch.enable_grad()
    def latent_reward_grad(self, particles: Particles, t: Tensor | float, weights: Sequence[float] = ()) -> Tensor:
        """Gradient of the latent reward to ``x [N, ...]``, 0 if there is none; costs a reward call.

        Args:
            weights: of the objectives of a latent reward ``[n, K]``; none = all 1.

        Raises:
            SearchError: another number of weights than objectives.
        """
        assert self.latent_reward is not None
        x, row, times = particles.x, particles.row, self._times(t, particles.x)
        self.meter.require(self.cost.latent_reward, row)
        parts = []
        for some in slices(len(x), self.decode_chunk):
            here = x[some].detach().requires_grad_()
            with self.meter.measured("reward_calls", row[some]):
                values = self.latent_reward(here, times[some], self.judge.texts(row[some]))
                values = values[:, None] if values.ndim == 1 else values
                if weights and len(weights) != values.shape[1]:
                    said = f"{len(weights)} weights, and the latent reward has {values.shape[1]} objectives"
                    raise SearchError(f"search.weights: {said}")
                values = values * values.new_tensor(weights or [1.0] * values.shape[1])
                parts.append(torch.autograd.grad(values.sum(), here)[0].nan_to_num(0.0, 0.0, 0.0))
        return torch.cat(parts)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _velocity(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        return self.generator.velocity(x, t, self.cond[row], self.sampler.guidance)

    def _times(self, t: Tensor | float, x: Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=self.times.dtype, device=x.device).expand(len(x))
