"""Log-probabilities of the same steps under the same weights: those of the rollout compared with those of the update.

They should be equal. Other batch sizes, a compiled graph without gradient or half precision make them differ, and a
policy gradient treats the difference as a change of the policy. One above the clipping range removes gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.rollout.rollout import Scored

if TYPE_CHECKING:
    from collections.abc import Iterable

    from align.config.settings import Config
    from align.recipes.base import Terms
    from align.recipes.grpo import GRPO
    from align.rollout.bench import Bench

PREFIX = "logp_gap/"


def gaps(ratios: Tensor) -> dict[str, float]:
    """Mean, 99th percentile and maximum of ``|log ratio|``, for the log.

    Args:
        ratios: ``[M]`` probability ratios of an update that began with the weights that sampled; M at least 1.
    """
    found = ratios.double().log().abs()
    values = {"mean": found.mean(), "p99": torch.quantile(found, 0.99), "max": found.max()}
    return {f"{PREFIX}{name}": float(value) for name, value in values.items()}


def warning(config: Config, row: dict[str, float]) -> str | None:
    """A warning where the differences of the first update reach the clipping range; None if they do not."""
    clip, found = getattr(config.recipe, "ratio_clip", None), row.get(f"{PREFIX}p99", 0.0)
    if clip is None or getattr(config.recipe, "ratio", "") == "dppo" or found < clip / 2:
        return None
    causes = [
        *([f"train.precision {config.train.precision}"] if config.train.precision != "no" else []),
        *([f"generator.dtype {config.generator.dtype}"] if config.generator.dtype != "float32" else []),
        *([f"memory.quantise {config.memory.quantise}"] if config.memory.quantise != "none" else []),
        *([f"memory.compile {config.memory.compile}"] if config.memory.compile != "none" else []),
        *_sizes(config),
        *([f"guidance {config.rollout.sampler.guidance:g}"] if config.rollout.sampler.guidance != 1 else []),  # type: ignore[union-attr]
    ]
    because = f" ({', '.join(causes)})" if causes else ""
    share = "reaches" if found >= clip else "is more than half of"
    return (
        f"log-probabilities of the rollout and of the update differ before any update: 1 % of them by {found:.2g} or "
        f"more, which {share} recipe.ratio_clip {clip:g}{because}; rollout.recompute=true computes those of the "
        "rollout again as the update does"
    )


def _sizes(config: Config) -> list[str]:
    rollout = config.rollout
    drawn = min(getattr(rollout, "chunk", 1), rollout.prompts * rollout.group)
    return [] if drawn == config.train.chunk else [f"rollout.chunk {drawn} beside train.chunk {config.train.chunk}"]


def recomputed(objective: GRPO, work: Iterable[tuple[Terms, Scored]], rollout: Scored, bench: Bench) -> Scored:
    """The rollout with the log-probabilities and means of its steps as the update computes them, chunk by chunk.

    The forward passes are those of the loss, with their graphs, so that a compiled network runs the same code.

    Args:
        work: every chunk of the update's terms and the rollout they belong to; those of another one only take part.
    """
    path = rollout.path
    logp, mean = path.logp.clone(), path.mean.clone()
    for terms, source in work:
        with bench.acting("policy"):
            step = objective.steps(terms, source, bench)("policy")  # type: ignore[arg-type]
        if source is rollout:
            logp[terms.sample, terms.slot] = step.logp.detach().to(logp)
            mean[terms.sample, terms.slot] = step.mean.detach().to(mean)
    return rollout.become(Scored, trajectory=replace(path, logp=logp, mean=mean))
