"""Counted scores of decoded samples, and the resulting candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from align.data.inputs import Inputs, take
from align.rollout.unroll import known_scores
from align.search.budget import Cost, Meter
from align.search.particles import Particles, cat
from align.search.results import Candidate, Found, between
from align.search.rows import finite, places, slices
from generators.base import Generator
from rewards.base import Reward

Render = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""``(x [n, ...], row [n])`` -> (latents to decode, velocity at ``x`` if it is known), with graph."""
Judged = tuple[Particles, Tensor, list[Tensor]]
"""Particles with value and gradient, the latents that were decoded ``[N, ...]``, N media on the CPU."""


class Judge:
    """Decodes, scores and keeps the best of B prompts.

    Args:
        inputs: what the reward reads of the prompts.
        chunk: samples per decode and reward call.
        keep: best candidates kept of each prompt.
    """

    def __init__(
        self,
        generator: Generator,
        reward: Reward,
        inputs: Inputs,
        found: list[Found],
        meter: Meter,
        chunk: int,
        keep: int,
    ) -> None:
        self.generator, self.reward, self.inputs, self.found = generator, reward, inputs, found
        self.meter, self.chunk, self.keep = meter, chunk, keep
        self._before = [meter.spent(b) for b in range(len(found))]

    def texts(self, row: Tensor) -> list[str]:
        """The prompt of each particle."""
        return [self.found[b].prompt for b in row.tolist()]

    def decode(self, latents: Tensor, row: Tensor) -> Tensor:
        """Media of one chunk, counted."""
        with self.meter.measured("decodes", row):
            return self.generator.decode(latents)

    def reward_of(self, media: Tensor, row: Tensor) -> Tensor:
        """Rewards ``[n]`` of one chunk, counted, with graph where gradients are on; why one is missing is noted."""
        with self.meter.measured("reward_calls", row):
            rows = row.cpu()
            scores = self.reward(media, self.texts(row), rows, take(self.inputs, rows))
            for index, why in scores.reasons.items():
                found = self.found[int(rows[index])]
                found.reason = found.reason or why
            return scores.values

    def values(self, latents: Tensor, row: Tensor, keep_media: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Rewards ``[N]`` float64 on the CPU, NaN where missing, and, if asked for, N media on the CPU."""
        self.meter.require(Cost(0, 1, 1), row)
        values: list[Tensor] = []
        kept: list[Tensor] = []
        for some in slices(len(latents), self.chunk):
            media = self.decode(latents[some], row[some])
            values.append(self.reward_of(media, row[some]))
            kept += list(media.cpu()) if keep_media else []
        return finite(torch.cat(values)), kept

    def values_and_grad(self, particles: Particles, render: Render, cost: Cost) -> Judged:
        """Reward of what is rendered from the particles, and its gradient to their ``x``, 0 if there is none.

        Args:
            cost: network and backward calls of ``render`` for one sample.
        """
        self.meter.require(cost + Cost(decodes=1, reward_calls=1), particles.row)
        parts = [self._values_and_grad(particles[some], render, cost) for some in slices(len(particles), self.chunk)]
        media = [one for _, _, some in parts for one in some]
        return cat([part for part, _, _ in parts]), torch.cat([latents for _, latents, _ in parts]), media

    @torch.enable_grad()
    def _values_and_grad(self, particles: Particles, render: Render, cost: Cost) -> Judged:
        """One chunk."""
        x, row = particles.x.detach().requires_grad_(), particles.row
        with self.meter.measured("network_calls", row, cost.network_calls):
            latents, v = render(x, row)
        media = self.decode(latents, row)
        values = self.reward_of(media, row)
        with self.meter.measured("backward_calls", row, cost.backward_calls):
            some = bool(values.isfinite().any())
            grad = torch.autograd.grad(known_scores(values, media).sum(), x)[0] if some else torch.zeros_like(x)
        v = particles.v if v is None else v.detach()
        judged = replace(particles, v=v, value=finite(values), grad=grad.nan_to_num(0.0, 0.0, 0.0))
        return judged, latents.detach(), list(media.detach().cpu())

    def offer(
        self,
        particles: Particles,
        values: Tensor,
        media: Sequence[Tensor],
        weights: Tensor | None = None,
        alone: bool = False,
    ) -> None:
        """Finished samples become candidates of their prompts.

        Args:
            values: ``[N]`` rewards; ``media`` N of them; ``weights [N]`` logarithms.
            alone: each was made by itself, so that what was spent since the last one is shared out among them.
        """
        row = particles.row
        after = [self.meter.spent(b) for b in range(len(self.found))]
        members = row.bincount(minlength=len(self.found)).tolist()
        log_weights = [math.nan] * len(row) if weights is None else weights.tolist()
        for n, (b, place) in enumerate(zip(row.tolist(), places(row), strict=True)):
            spent = between(self._before[b], after[b], (place + 1) / members[b]) if alone else after[b]
            one = Candidate(
                values[n].item(), particles.x[n].cpu(), media[n], particles.lineage[n], len(self.found[b].rewards),
                log_weights[n],
            )  # fmt: skip
            self.found[b].offer(one, spent, self.keep)
        self._before = after
