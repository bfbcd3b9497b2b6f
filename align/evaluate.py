"""Held-out scores of a role, and sample grids of fixed prompts and seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.grids import save_samples
from align.rollout import decode, diversity, draw
from align.seeds import derive
from generators.base import Generator
from rewards.base import Reward

if TYPE_CHECKING:
    from align.config import Evaluate, Sampler


@dataclass
class Evaluation:
    """Scores of P samples, one per prompt, made from fixed seeds.

    Args:
        scores: reward name -> ``[P]``, NaN where missing.
        media: ``[shown, ...]`` the first samples, for the grid.
    """

    prompts: list[str]
    seeds: list[int]
    scores: dict[str, Tensor]
    media: Tensor
    diversity: float
    seconds: float

    def row(self) -> dict[str, Any]:
        """Means, standard errors and missing counts, as they stand in ``metrics.jsonl``."""
        known = {name: values[values.isfinite()] for name, values in self.scores.items()}
        return {
            "prompts": len(self.prompts),
            "seconds": self.seconds,
            "scores": {name: mean(values) for name, values in known.items()},
            "stderr": {name: standard_error(values) for name, values in known.items()},
            "missing": {name: len(self.prompts) - len(values) for name, values in known.items()},
            "diversity": self.diversity,
        }


def mean(values: Tensor) -> float:
    """Mean, NaN for none."""
    return float(values.double().mean()) if len(values) else math.nan


def standard_error(values: Tensor) -> float:
    """Standard error of the mean, NaN for fewer than two."""
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def evaluate(
    generator: Generator,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    settings: Evaluate,
    *,
    indices: Sequence[int] | None = None,
    show: int = 0,
    chunk: int = 256,
) -> Evaluation:
    """Sample every prompt once under the role in place and score it with every reward.

    Args:
        prompts: held-out prompts.
        indices: which of them (one process's share); all by default. Sample i is seeded by (evaluate.seed, i).
        show: how many of the samples to keep as media.
    """
    started = time.perf_counter()
    chosen = list(range(len(prompts)) if indices is None else indices)
    texts = [prompts[i] for i in chosen]
    seeds = [derive(settings.seed, "evaluate", i) for i in chosen]
    values: dict[str, list[Tensor]] = {name: [] for name in rewards}
    shown: list[Tensor] = []
    spread: list[Tensor] = []
    for start in range(0, len(texts), chunk):
        part = slice(start, start + chunk)
        media = sample_media(generator, texts[part], seeds[part], settings.sampler, chunk)
        scored = {id(reward): reward(media, texts[part]).values.float().cpu() for reward in rewards.values()}
        for name, reward in rewards.items():
            values[name].append(scored[id(reward)])
        shown.append(media[: max(show - start, 0)].cpu())
        spread.append(torch.tensor([diversity(media, torch.zeros(len(media)))]))
    scores = {name: torch.cat(parts) for name, parts in values.items()}
    elapsed = time.perf_counter() - started
    return Evaluation(texts, seeds, scores, torch.cat(shown), float(torch.cat(spread).mean()), elapsed)


def sample_media(
    generator: Generator, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler, chunk: int = 256
) -> Tensor:
    """One sample per prompt: media ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` in [0, 1]."""
    unique = list(dict.fromkeys(prompts))
    row = torch.tensor([unique.index(prompt) for prompt in prompts], device=generator.device)
    cond = generator.encode(unique)[row]
    latents, _ = draw(generator, cond, seeds, sampler, chunk=chunk)
    return decode(generator, latents, chunk)


def save_grid(folder: Path, result: Evaluation, count: int) -> None:
    """Write the first ``count`` samples of an evaluation as pictures, one grid and ``prompts.json``."""
    images = (result.media[:count] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    scores = {name: values[:count].tolist() for name, values in result.scores.items()}
    save_samples(folder, list(images), result.prompts[:count], result.seeds[:count], scores)
