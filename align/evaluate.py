"""Held-out scores of a role, and sample grids of fixed prompts and seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from align import checkpoint as checkpoints
from align.build import build_generator, build_rewards, trainable
from align.errors import CheckpointError, ConfigError, RunFolderError
from align.grids import save_samples
from align.lora import load_lora
from align.prompts import read_prompts
from align.roles import Roles
from align.rollout import decode, diversity, draw
from align.seeds import derive
from generators.base import Generator
from rewards.base import Reward

if TYPE_CHECKING:
    from align.settings import Config, Evaluate, Sampler


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
    for start in range(0, len(texts), settings.chunk):
        part = slice(start, start + settings.chunk)
        media = sample_media(generator, texts[part], seeds[part], settings.sampler, settings.chunk)
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


def evaluate_run(config: Config, run_dir: Path | None = None, checkpoint: Path | None = None) -> dict[str, Any]:
    """Held-out scores of a config's base, or of the policy in a run's checkpoint (its newest unless one is named).

    Raises:
        ConfigError: the config names no held-out prompts or no rewards to score them with.
        CheckpointError: there is no checkpoint, or it belongs to another model.
    """
    if config.prompts.heldout is None:
        raise ConfigError("prompts.heldout is not set: there is nothing to evaluate on")
    trained = {"reward": config.reward} if config.reward else {}
    rewards = build_rewards({**trained, **config.evaluate.rewards}, device_of(config))
    if not rewards:
        raise ConfigError("evaluate.rewards is empty and no reward is trained: there is nothing to score with")
    generator = build_generator(config, device_of(config))
    role, path = "base", checkpoint
    if run_dir is not None or checkpoint is not None:
        roles = Roles(trainable(config, generator), ["old", "ref", "ema"])
        path = checkpoint or checkpoints.latest(run_dir / "checkpoints" if run_dir else Path())
        if path is None:
            raise CheckpointError(f"{run_dir} has no checkpoint yet")
        checkpoints.load(path, roles)
        role = config.evaluate.role if config.train.ema else "policy"
        with roles.use(role):
            result = _held_out(generator, config, rewards)
    else:
        result = _held_out(generator, config, rewards)
    return {"role": role, "checkpoint": str(path) if path else None, **result.row()}


def _held_out(generator: Generator, config: Config, rewards: Mapping[str, Reward]) -> Evaluation:
    settings = config.evaluate
    assert config.prompts.heldout is not None
    return evaluate(generator, read_prompts(config.prompts.heldout, settings.prompts, settings.seed), rewards, settings)


def sample_to_folder(
    config: Config,
    out: Path,
    *,
    prompts: Sequence[str] | None = None,
    count: int = 1,
    seed: int = 0,
    lora: Path | None = None,
) -> Path:
    """Draw ``count`` samples per prompt with the evaluation sampler into ``out``: pictures, grid, ``prompts.json``.

    Args:
        prompts: the config's first held-out ones by default.
        lora: LoRA to put on the base.

    Raises:
        RunFolderError: ``out`` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise RunFolderError(f"{out} exists and is not empty; choose another folder with --out")
    source = config.prompts.heldout or config.prompts.train
    texts = list(prompts) if prompts else read_prompts(source, config.samples.count or 8, config.evaluate.seed)
    generator = build_generator(config, device_of(config))
    if lora is not None:
        load_lora(generator, lora)
    repeated = [text for text in texts for _ in range(count)]
    seeds = [derive(seed, "sample", index) for index in range(len(repeated))]
    media = sample_media(generator, repeated, seeds, config.evaluate.sampler, config.evaluate.chunk)
    save_samples(out, pictures(media), repeated, seeds)
    return out


def device_of(config: Config) -> torch.device:
    """The device a command uses: the config's, or what accelerate would choose."""
    if config.generator.device != "auto":
        return torch.device(config.generator.device)
    from accelerate import PartialState

    return PartialState().device


def pictures(media: Tensor) -> list[np.ndarray]:
    """Media ``[N, 3, H, W]`` in [0, 1] -> uint8 arrays ``[H, W, 3]``; of a clip ``[F, 3, H, W]`` the middle frame."""
    if media.ndim == 5:
        media = media[:, media.shape[1] // 2]
    return list((media * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy())


def save_grid(folder: Path, result: Evaluation, count: int) -> None:
    """Write the first ``count`` samples of an evaluation as pictures, one grid and ``prompts.json``."""
    scores = {name: values[:count].tolist() for name, values in result.scores.items()}
    save_samples(folder, pictures(result.media[:count]), result.prompts[:count], result.seeds[:count], scores)
