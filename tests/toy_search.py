"""A generator without a network: the exact velocity of Gaussian data, whose tilted law is known."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from align.data.prompts import Prompt
from align.maths.samplers import step
from align.search.driver import make, parse
from align.search.task import Task
from generators.base import Conditioning
from rewards.base import Reward, Scores

SHAPE = (3, 1, 2)
SLOPE = torch.tensor([0.6, -0.4, 0.2, 0.5, -0.3, 0.1], dtype=torch.double).view(SHAPE)
SPREAD = 0.7
PROMPTS = ["one", "two", "three"]


class Gaussian:
    """Data N(mean of the prompt, SPREAD^2) in six dimensions; media are the latents."""

    inputs: tuple[str, ...] = ()
    pipeline_class = "Gaussian"
    size = (1, 2)
    device = torch.device("cpu")
    users = None

    def __init__(self) -> None:
        self.network_calls = 0
        self.decodes = 0
        self.largest = 0

    def encode(self, prompts, inputs=None) -> Conditioning:
        means = [torch.full(SHAPE, 0.1 * len(text), dtype=torch.double) for text in prompts]
        return Conditioning({"mean": torch.stack(means)})

    def noise(self, seeds) -> Tensor:
        rows = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s), dtype=torch.double) for s in seeds]
        return torch.stack(rows)

    def times(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.double)

    def velocity(self, x, t, cond, guidance=1.0) -> Tensor:
        self.network_calls += len(x) * (1 if guidance == 1 else 2)
        self.largest = max(self.largest, len(x))
        t = t.expand(len(x)).view(-1, 1, 1, 1)
        mean = cond.tensors["mean"]
        variance = (1 - t) ** 2 * SPREAD**2 + t**2
        return -mean + (t - (1 - t) * SPREAD**2) * (x - (1 - t) * mean) / variance

    def decode(self, latents: Tensor) -> Tensor:
        self.decodes += len(latents)
        self.largest = max(self.largest, len(latents))
        return latents


class Linear:
    """The reward a . x, with a count of its calls; ``missing`` says where it has none."""

    def __init__(self, differentiable: bool = True, missing=None) -> None:
        self.calls, self.missing = 0, missing
        self.reward = Reward("linear", self, differentiable=differentiable)

    def __call__(self, media, prompts, group):
        self.calls += len(media)
        values = (media * SLOPE).flatten(1).sum(1)
        if self.missing is None:
            return values
        gone = self.missing(values.detach())
        why = {int(n): "the judge fell asleep" for n in gone.nonzero().flatten()}
        return Scores(values.masked_fill(gone, float("nan")), why)


def task_of(method, budget, prompts=PROMPTS, seed=0, reward=None, generator=None, **options) -> Task:
    """The task of one batch of prompts."""
    made = [Prompt(text) for text in prompts]
    judge = reward or Linear().reward
    return make(generator or Gaussian(), judge, made, list(range(len(made))), parse(method, budget), seed, **options)


def law(kind: str, steps: int, level: float, mean: float) -> tuple[float, float]:
    """(mean, variance) of what the sampler makes of N(0, 1) in one dimension: every step is affine."""
    generator, times = Gaussian(), torch.linspace(1, 0, steps + 1, dtype=torch.double)
    cond = Conditioning({"mean": torch.full((2, *SHAPE), mean, dtype=torch.double)})
    x = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)]).double()
    m, s = 0.0, 1.0
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = generator.velocity(x, t, cond)
        last = i == steps - 1
        made = step("ode" if last else kind, x, v, t, t_next, noise_level=level, t_second=float(times[1]), x_next=x)
        offset, slope = float(made.mean[0, 0, 0, 0]), float((made.mean[1] - made.mean[0])[0, 0, 0])
        m, s = offset + slope * m, slope**2 * s + float(made.std[0]) ** 2
    return m, s
