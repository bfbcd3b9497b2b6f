"""A batch of prompts: their particles and noise, derived from the seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from align.maths.seeds import derive
from align.search.particles import Particles
from generators.base import Generator


class PromptBatch:
    """B prompts and where their noise comes from: (seed, prompt's number, purpose, particle's number).

    Args:
        texts: B prompts; ``numbers`` their places among all prompts.
    """

    def __init__(self, generator: Generator, texts: Sequence[str], numbers: Sequence[int], seed: int) -> None:
        self.generator, self.texts, self.numbers, self.seed = generator, list(texts), list(numbers), seed
        self._begun = 0

    @property
    def prompts(self) -> int:
        """B."""
        return len(self.texts)

    def noise(self, particles: Particles, *purpose: int | str) -> Tensor:
        """Standard normal ``[N, ...]`` for a purpose; each particle's depends on its prompt and its number."""
        rows, numbers = particles.row.tolist(), particles.number.tolist()
        return self._noise(rows, numbers, *purpose)

    def begin(self, count: int) -> Particles:
        """``count`` new noises per prompt: the same ones in the same order for every method.

        They are numbered through the whole search; ``.numbered()`` numbers them from 0.
        """
        numbers = list(range(self._begun, self._begun + count)) * self.prompts
        self._begun += count
        row = torch.arange(self.prompts, device=self.generator.device).repeat_interleave(count)
        x = self._noise(row.tolist(), numbers, "start")
        return Particles(x, row, torch.tensor(numbers, dtype=torch.int64), tuple((f"noise {k}",) for k in numbers))

    def uniform(self, *purpose: int | str, each: int | None = None) -> Tensor:
        """Numbers in [0, 1), float64: one per prompt ``[B]``, or ``each`` per prompt ``[B * each]``."""
        if each is not None:
            return torch.stack([self.uniform(*purpose, k) for k in range(each)], 1).flatten()
        seeds = [derive(self.seed, "search", number, *purpose) for number in self.numbers]
        return torch.tensor([seed / 2**63 for seed in seeds], dtype=torch.float64).clamp_max(1 - 2**-53)

    def random(self, *purpose: int | str) -> list[torch.Generator]:
        """One source of random numbers on the CPU per prompt."""
        return [torch.Generator().manual_seed(int(draw * 2**53)) for draw in self.uniform(*purpose).tolist()]

    def _noise(self, rows: Sequence[int], numbers: Sequence[int], *purpose: int | str) -> Tensor:
        prompts = [self.numbers[b] for b in rows]
        return self.generator.noise(
            [derive(self.seed, "search", p, *purpose, k) for p, k in zip(prompts, numbers, strict=True)]
        )
