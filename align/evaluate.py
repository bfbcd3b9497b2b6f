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
from align.grids import save_samples, still
from align.inputs import encode, read_inputs
from align.media import to_pixels
from align.policy import load_policy
from align.prompts import Prompt, check_media, read_prompts
from align.roles import Roles
from align.rollout import decode, diversity, draw
from align.seeds import derive
from generators.base import Conditioning, Generator
from rewards.base import Reward

if TYPE_CHECKING:
    from align.sampling import Sampler
    from align.settings import Config, Evaluate, Samples


@dataclass
class Evaluation:
    """Scores of P samples, one per prompt, made from fixed seeds.

    Args:
        scores: reward name -> ``[P]``, NaN where missing.
        media: ``[shown, ...]`` the first samples, for the grid.
        sources: ``[shown, 3, H, W]`` what these were made from, where prompts come with a picture.
    """

    prompts: list[str]
    seeds: list[int]
    scores: dict[str, Tensor]
    media: Tensor
    diversity: float
    seconds: float
    sources: Tensor | None = None

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
    prompts: Sequence[Prompt],
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
    asked, wants = [prompts[i] for i in chosen], wanted(rewards)
    texts = [prompt.text for prompt in asked]
    seeds = [derive(settings.seed, "evaluate", i) for i in chosen]
    values: dict[str, list[Tensor]] = {name: [] for name in rewards}
    shown: list[Tensor] = []
    sources: list[Tensor] = []
    spread: list[Tensor] = []
    for start in range(0, len(texts), settings.chunk):
        part = slice(start, start + settings.chunk)
        cond, inputs = encode(generator, asked[part], wants)
        media = _draw(generator, cond, seeds[part], settings.sampler, settings.chunk)
        scores_of = {id(reward): reward(media, texts[part], None, inputs) for reward in rewards.values()}
        for name, reward in rewards.items():
            values[name].append(scores_of[id(reward)].values.float().cpu())
        shown.append(media[: max(show - start, 0)].cpu())
        if "image" in inputs:
            sources.append(source_of(inputs)[: max(show - start, 0)])
        spread.append(torch.tensor([diversity(media, torch.zeros(len(media)))]))
    scores = {name: torch.cat(parts) for name, parts in values.items()}
    elapsed = time.perf_counter() - started
    made_from = torch.cat(sources) if sources else None
    return Evaluation(texts, seeds, scores, torch.cat(shown), float(torch.cat(spread).mean()), elapsed, made_from)


def source_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """The pictures that prompts come with, ``[N, 3, H, W]`` in [0, 1]; gray where a mask has them drawn anew."""
    mask = inputs.get("mask", torch.zeros(()))
    return inputs["image"] * (1 - mask) + 0.5 * mask


def wanted(rewards: Mapping[str, Reward]) -> tuple[str, ...]:
    """Names of the inputs that any of the rewards asks for."""
    return tuple(dict.fromkeys(name for reward in rewards.values() for name in reward.wants))


def held_out(config: Config, generator: Generator, rewards: Mapping[str, Reward]) -> list[Prompt]:
    """The prompts a config evaluates on.

    Raises:
        DataError: they cannot be read, or come without what generator or rewards need.
    """
    assert config.prompts.heldout is not None
    prompts = read_prompts(config.prompts.heldout, config.evaluate.prompts, config.evaluate.seed)
    check_needs(prompts, generator, rewards)
    return prompts


def check_needs(prompts: Sequence[Prompt], generator: Generator, rewards: Mapping[str, Reward]) -> None:
    """Raise DataError for a prompt that comes without a picture which the generator or a reward needs."""
    check_media(prompts, generator.inputs, generator.pipeline_class)
    for reward in rewards.values():
        check_media(prompts, reward.wants, f"reward {reward.name!r}")


def sample_media(
    generator: Generator, prompts: Sequence[Prompt | str], seeds: Sequence[int], sampler: Sampler, chunk: int = 256
) -> Tensor:
    """One sample per prompt: media ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` in [0, 1]. A text is a prompt by itself."""
    made = {text: Prompt(text) for text in prompts if isinstance(text, str)}
    asked = [made[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
    check_needs(asked, generator, {})
    return _draw(generator, encode(generator, asked)[0], seeds, sampler, chunk)


def _draw(generator: Generator, cond: Conditioning, seeds: Sequence[int], sampler: Sampler, chunk: int) -> Tensor:
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
    of_run = run_dir is not None or checkpoint is not None
    learning = "reward" if of_run else None
    rewards = build_rewards({**trained, **config.evaluate.rewards}, device_of(config), learning=learning)
    if not rewards:
        raise ConfigError("evaluate.rewards is empty and no reward is trained: there is nothing to score with")
    generator = build_generator(config, device_of(config))
    role, path = "base", checkpoint
    if of_run:
        roles = Roles(trainable(config, generator), ["old", "ref", "ema"])
        path = checkpoint or checkpoints.latest(run_dir / "checkpoints" if run_dir else Path())
        if path is None:
            raise CheckpointError(f"{run_dir} has no checkpoint yet")
        checkpoints.load(path, roles, refreshed=rewards["reward"].refresh if trained else None)
        role = config.evaluate.role if config.train.ema else "policy"
        with roles.use(role):
            result = _held_out(generator, config, rewards)
    else:
        result = _held_out(generator, config, rewards)
    return {"role": role, "checkpoint": str(path) if path else None, **result.row()}


def _held_out(generator: Generator, config: Config, rewards: Mapping[str, Reward]) -> Evaluation:
    return evaluate(generator, held_out(config, generator, rewards), rewards, config.evaluate)


def sample_to_folder(
    config: Config,
    out: Path,
    *,
    prompts: Sequence[Prompt] | None = None,
    count: int = 1,
    seed: int = 0,
    policy: Path | None = None,
) -> Path:
    """Draw ``count`` samples per prompt with the evaluation sampler into ``out``, as :func:`save_samples` writes them.

    Args:
        prompts: the config's first held-out ones by default.
        policy: what was trained, put onto the base, see :func:`align.policy.load_policy`.

    Raises:
        RunFolderError: ``out`` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise RunFolderError(f"{out} exists and is not empty; choose another folder with --out")
    source = config.prompts.heldout or config.prompts.train
    asked = list(prompts) if prompts else read_prompts(source, config.samples.count or 8, config.evaluate.seed)
    generator = build_generator(config, device_of(config))
    if policy is not None:
        load_policy(generator, policy)
    repeated = [prompt for prompt in asked for _ in range(count)]
    seeds = [derive(seed, "sample", index) for index in range(len(repeated))]
    media = sample_media(generator, repeated, seeds, config.evaluate.sampler, config.evaluate.chunk)
    texts, how = [prompt.text for prompt in repeated], config.samples
    inputs = read_inputs(repeated, generator.inputs, generator.size)
    sources = to_pixels(source_of(inputs)) if "image" in inputs else None
    return save_samples(out, to_pixels(media), texts, seeds, sources=sources, fps=how.fps, clips=how.clips)


def device_of(config: Config) -> torch.device:
    """The device a command uses: the config's, or what accelerate would choose."""
    if config.generator.device != "auto":
        return torch.device(config.generator.device)
    from accelerate import PartialState

    return PartialState().device


def pictures(media: Tensor) -> list[np.ndarray]:
    """Media ``[N, 3, H, W]`` in [0, 1] -> uint8 arrays ``[H, W, 3]``; of a clip ``[F, 3, H, W]`` the middle frame."""
    return [still(pixels) for pixels in to_pixels(media)]


def save_grid(folder: Path, result: Evaluation, how: Samples) -> None:
    """Write the first samples of an evaluation as pictures or clips, one grid and ``prompts.json``."""
    first = slice(how.count)
    scores = {name: values[first].tolist() for name, values in result.scores.items()}
    pixels = to_pixels(result.media[first])
    sources = None if result.sources is None else to_pixels(result.sources[first])
    save_samples(
        folder, pixels, result.prompts[first], result.seeds[first], scores,
        sources=sources, fps=how.fps, clips=how.clips,
    )  # fmt: skip
