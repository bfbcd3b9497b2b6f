"""Held-out scores of a role, and sample grids with fixed prompts and seeds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from align.data.files import without_nan
from align.data.grids import save_samples, still
from align.data.inputs import Inputs, check_needs, encode, read_inputs
from align.data.media import from_bytes, to_bytes, to_pixels
from align.data.prompts import Prompt, read_prompts
from align.evaluation import alone
from align.evaluation.spread import Spread
from align.maths.seeds import derive
from align.maths.statistics import mean, standard_error
from align.policy.build import build_generator, build_rewards, trainable
from align.policy.roles import Roles
from align.policy.users import choose
from align.rollout.rollout import decode, draw
from align.runs import checkpoint as checkpoints
from align.runs import devices
from align.runs.lock import check_unwritten, locked
from align.runs.per_prompt import PromptScores, kind_of
from align.runs.progress import said
from align.runs.threads import settle
from align.runs.trained import load_policy
from alignflow.errors import CheckpointError, ConfigError
from alignflow.text import printable
from generators.base import Conditioning, Generator
from rewards.base import Reward, wanted

if TYPE_CHECKING:
    from align.config.sampling import Sampler
    from align.config.sections import Evaluate, Samples
    from align.config.settings import Config
    from align.config.sources import Prompts
    from align.runs.processes import Processes


@dataclass
class Evaluation:
    """Scores of P samples, one per prompt, made from fixed seeds.

    Args:
        scores: reward name -> ``[P]``, NaN where missing.
        media: ``[shown, ...]`` the first samples, for the grid.
        sources: ``[shown, 3, H, W]`` what these were made from, where prompts come with an image.
        reasons: reward name -> index -> why there is no score.
        kinds: ``[P]`` the kind of each prompt, None if its table names none.
    """

    prompts: list[str]
    seeds: list[int]
    scores: dict[str, Tensor]
    media: Tensor
    diversity: float
    seconds: float
    sources: Tensor | None = None
    reasons: dict[str, dict[int, str]] = field(default_factory=dict)
    kinds: list[str | None] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Means, standard errors and missing counts, as they are in ``metrics.jsonl``."""
        known = {name: values[values.isfinite()] for name, values in self.scores.items()}
        return {
            "prompts": len(self.prompts),
            "seconds": self.seconds,
            "scores": {name: mean(values) for name, values in known.items()},
            "stderr": {name: standard_error(values) for name, values in known.items()},
            "missing": {name: len(self.prompts) - len(values) for name, values in known.items()},
            "diversity": self.diversity,
        }

    def by_prompt(self) -> list[PromptScores]:
        """The scores prompt by prompt."""
        columns = {name: without_nan(values.tolist()) for name, values in self.scores.items()}
        return [
            PromptScores(
                prompt,
                self.seeds[i],
                {name: column[i] for name, column in columns.items()},
                {name: why[i] for name, why in self.reasons.items() if i in why},
                self.kinds[i] if self.kinds else None,
            )
            for i, prompt in enumerate(self.prompts)
        ]


def scored(result: Evaluation, name: str) -> str:
    """The mean score of a reward in words: how many samples have one, if not all, and the first reason if none has."""
    row, count = result.row(), len(result.prompts)
    missing, told = row["missing"][name], said(row["scores"][name])
    if not missing:
        return told
    reason = " ".join(next(iter(result.reasons.get(name, {}).values()), "no reason given").split())
    return f"{told} ({count - missing} of {count} scored)" if missing < count else f"{told} ({printable(reason, 300)})"


def evaluate(
    generator: Generator,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    settings: Evaluate,
    *,
    indices: Sequence[int] | None = None,
    show: int = 0,
    processes: Processes | None = None,
) -> Evaluation:
    """Sample every prompt once under the role in place and score it with every reward.

    A reward that compares samples is shown by those of its parts that do not: ``reward/clip``.

    Args:
        prompts: held-out prompts. Sample i is seeded by (evaluate.seed, i).
        indices: indices of the prompts to use; all by default.
        show: how many of the samples to keep as media.
        processes: processes among which the samples are divided; each of them returns the whole result.
    """
    started = time.perf_counter()
    asked = list(range(len(prompts)) if indices is None else indices)
    show = min(show, len(asked))
    mine = range(len(asked)) if processes is None else processes.share.of(len(asked))
    seeds = [derive(settings.seed, "evaluate", i) for i in asked]
    spread, rows = Spread(), []
    media: dict[int, Tensor] = {}
    sources: dict[int, Tensor] = {}
    with nullcontext() if processes is None else processes.uneven(), generator.sized(settings.size):
        for start in range(0, len(mine), settings.chunk):
            places = mine[start : start + settings.chunk]
            some = [prompts[asked[place]] for place in places]
            drawn, inputs = generate(generator, some, [seeds[place] for place in places], wanted(rewards), settings)
            rows += score_rows(drawn, some, inputs, rewards) if processes is None or processes.leads else []
            spread.add(drawn)
            first = {row: place for row, place in enumerate(places) if place < show}
            media |= {place: drawn[row].cpu() for row, place in first.items()}
            sources |= {place: source_of(inputs)[row] for row, place in first.items()} if "image" in inputs else {}
    if processes is not None:
        rows = processes.objects(rows)
        media, sources = (_shown(kept, show, len(asked), processes) for kept in (media, sources))
    chosen, names = [prompts[i] for i in asked], list(rows[0][0]) if rows else []
    return Evaluation(
        [prompt.text for prompt in chosen], seeds,
        {name: torch.tensor([values[name] for values, _ in rows]) for name in names},
        _stacked(media, show), spread.value(processes), time.perf_counter() - started,
        _stacked(sources, show) if sources else None,
        {name: {i: why[name] for i, (_, why) in enumerate(rows) if name in why} for name in names},
        [kind_of(prompt.metadata) for prompt in chosen],
    )  # fmt: skip


def generate(
    generator: Generator, prompts: Sequence[Prompt], seeds: Sequence[int], wants: Sequence[str], settings: Evaluate
) -> tuple[Tensor, Inputs]:
    """One sample per prompt by the evaluation sampler, and the inputs of the prompts that rewards need."""
    cond, inputs = encode(generator, prompts, wants)
    return _draw(generator, cond, seeds, settings.sampler, settings.chunk), inputs


def score_rows(
    media: Tensor, prompts: Sequence[Prompt], inputs: Inputs, rewards: Mapping[str, Reward]
) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Scores by name of each sample, NaN where missing, and the reasons of those."""
    texts = [prompt.text for prompt in prompts]
    found = {id(reward): reward(media, texts, None, inputs) for reward in rewards.values()}
    known: dict[str, tuple[Tensor, dict[int, str]]] = {}
    for name, reward in rewards.items():
        known |= alone.columns(name, reward, found[id(reward)])
    values = {name: column.float().tolist() for name, (column, _) in known.items()}
    return [
        (
            {name: column[row] for name, column in values.items()},
            {name: reasons[row] for name, (_, reasons) in known.items() if row in reasons},
        )
        for row in range(len(texts))
    ]


def _shown(kept: dict[int, Tensor], show: int, count: int, processes: Processes) -> dict[int, Tensor]:
    """The shown samples of all processes, sent one by one as pixels: videos are large."""
    found: dict[int, Tensor] = {}
    for place in range(show):
        mine = kept.get(place)
        pixels = None if mine is None else to_bytes(mine)
        sent = processes.sent(pixels, processes.share.owner(place, count))
        found |= {} if sent is None else {place: from_bytes(sent)}
    return found


def _stacked(kept: Mapping[int, Tensor], show: int) -> Tensor:
    return torch.stack([kept[place] for place in range(show)]) if show else torch.empty(0)


def source_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """The source images of prompts, ``[N, 3, H, W]`` in [0, 1]; grey where a mask marks them to be repainted."""
    mask = inputs.get("mask", torch.zeros(()))
    return inputs["image"] * (1 - mask) + 0.5 * mask


def held_out(
    source: Prompts,
    settings: Evaluate,
    generator: Generator,
    rewards: Mapping[str, Reward],
    skipped: dict[str, str] | None = None,
) -> list[Prompt]:
    """The prompts a config evaluates on.

    Args:
        source: section ``prompts``, which names held-out ones.
        skipped: takes place -> why of the rows that are left out, where ``prompts.bad`` says so.

    Raises:
        DataError: they cannot be read, or come without what generator or rewards need.
    """
    assert source.heldout is not None
    skipped = (skipped if skipped is not None else {}) if source.bad == "skip" else None
    prompts = read_prompts(source.heldout, settings.prompts, settings.seed, skipped=skipped)
    if skipped is None:
        check_needs(prompts, generator, rewards)
    return prompts


def sample_media(
    generator: Generator, prompts: Sequence[Prompt | str], seeds: Sequence[int], sampler: Sampler, chunk: int = 256
) -> Tensor:
    """One sample per prompt: media ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` in [0, 1]. A text is a prompt by itself."""
    made = {text: Prompt(text) for text in prompts if isinstance(text, str)}
    asked = [made[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
    check_needs(asked, generator, {})
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(asked))}
    row = torch.tensor([place[prompt] for prompt in asked])
    return _draw(generator, encode(generator, list(place))[0], seeds, sampler, chunk, row)


def _draw(
    generator: Generator,
    cond: Conditioning,
    seeds: Sequence[int],
    sampler: Sampler,
    chunk: int,
    row: Tensor | None = None,
) -> Tensor:
    latents, _ = draw(generator, cond, seeds, sampler, row=row, chunk=chunk)
    return decode(generator, latents, chunk)


def evaluate_run(
    config: Config, run_dir: Path | None = None, checkpoint: Path | None = None, lora: Path | None = None
) -> dict[str, Any]:
    """Held-out scores of a config's base, or of the policy in a run's checkpoint (its newest unless one is named).

    Args:
        lora: scored on the base instead of a run's policy, see :func:`align.runs.trained.load_policy`.

    Raises:
        ConfigError: the config names no held-out prompts or no rewards to score them with; a LoRA and a checkpoint.
        LoraError: the LoRA is damaged or was made for another model.
        CheckpointError: there is no checkpoint, or it belongs to another model.
    """
    if config.prompts.heldout is None:
        raise ConfigError("prompts.heldout is not set: there is nothing to evaluate on")
    trained = {"reward": config.reward} if config.reward else {}
    if lora is not None and checkpoint is not None:
        raise ConfigError("a LoRA and a checkpoint are two policies; name one of them")
    of_run = lora is None and (run_dir is not None or checkpoint is not None)
    learning = "reward" if of_run else None
    device = devices.chosen(config.generator.device)
    rewards = build_rewards({**trained, **config.evaluate.rewards}, device, config.memory, learning=learning)
    learning_reward = rewards.get("reward") if trained else None
    if not rewards:
        raise ConfigError("evaluate.rewards is empty and no reward is trained: there is nothing to score with")
    rewards = alone.scored_alone(rewards, config.evaluate)
    if not rewards:
        raise ConfigError("the reward compares samples, but evaluation has one per prompt: set evaluate.rewards")
    generator = build_generator(config.generator, config.memory, device, kinds=[config.evaluate.sampler.kind])
    role, path = "base", checkpoint
    if of_run:
        role = config.evaluate.role if config.train.ema else "policy"
        roles = Roles(trainable(config, generator), [role] if role != "policy" else [])
        path = checkpoint or checkpoints.latest(run_dir / "checkpoints" if run_dir else Path())
        if path is None:
            raise CheckpointError(f"{run_dir} has no checkpoint yet")
        checkpoints.load(path, {"policy": roles}, refreshed=learning_reward.refresh if learning_reward else None)
        with roles.use(role):
            result = _held_out(generator, config, rewards)
    else:
        if lora is not None:
            load_policy(generator, lora)
            choose(generator, config.policy)
            role = f"lora {lora}"
        result = _held_out(generator, config, rewards)
    return {"role": role, "checkpoint": str(path) if path else None, **result.row()}


def _held_out(generator: Generator, config: Config, rewards: Mapping[str, Reward]) -> Evaluation:
    return evaluate(generator, held_out(config.prompts, config.evaluate, generator, rewards), rewards, config.evaluate)


def sample_to_folder(
    config: Config,
    out: Path,
    *,
    prompts: Sequence[Prompt] | None = None,
    count: int = 1,
    seed: int = 0,
    policy: Path | None = None,
) -> Path:
    """Write ``count`` samples per prompt, by the evaluation sampler, into ``out`` as :func:`save_samples` does.

    The contact sheet, and the sources of edits, go into ``sheet/`` inside: every image in ``out`` is a sample.

    Args:
        prompts: the config's first held-out ones by default.
        policy: what was trained, put onto the base, see :func:`align.runs.trained.load_policy`.

    Raises:
        RunFolderError: ``out`` exists and is not empty.
    """
    check_unwritten(out)
    source = config.prompts.heldout or config.prompts.sources[0].file
    asked = list(prompts) if prompts else read_prompts(source, config.samples.count or 8, config.evaluate.seed)
    device = devices.chosen(config.generator.device)
    generator = build_generator(config.generator, config.memory, device, kinds=[config.evaluate.sampler.kind])
    if policy is not None:
        load_policy(generator, policy)
        choose(generator, config.policy)
    repeated = [prompt for prompt in asked for _ in range(count)]
    seeds = [derive(seed, "sample", index) for index in range(len(repeated))]
    texts, how = [prompt.text for prompt in repeated], config.samples
    with generator.sized(config.evaluate.size):
        said = settle(generator, asked, min(config.evaluate.chunk, len(repeated))).said
        if said:
            print(said, file=sys.stderr)
        media = sample_media(generator, repeated, seeds, config.evaluate.sampler, config.evaluate.chunk)
        inputs = read_inputs(repeated, generator.inputs, generator.size)
    sources = to_pixels(source_of(inputs)) if "image" in inputs else None
    with locked(out):
        return save_samples(
            out, to_pixels(media), texts, seeds,
            sources=sources, fps=how.fps, video=how.video, noise=_noise(seeds), apart=True,
        )  # fmt: skip


def images(media: Tensor) -> list[np.ndarray]:
    """Media ``[N, 3, H, W]`` in [0, 1] -> uint8 arrays ``[H, W, 3]``; of a video ``[F, 3, H, W]`` the middle frame."""
    return [still(pixels) for pixels in to_pixels(media)]


def save_grid(folder: Path, result: Evaluation, how: Samples) -> None:
    """Write the first samples of an evaluation as images or videos, one grid and ``prompts.json``."""
    first = slice(how.count)
    scores = {name: values[first].tolist() for name, values in result.scores.items()}
    pixels = to_pixels(result.media[first])
    sources = None if result.sources is None else to_pixels(result.sources[first])
    save_samples(
        folder, pixels, result.prompts[first], result.seeds[first], scores,
        sources=sources, fps=how.fps, video=how.video, replaces=True, noise=_noise(result.seeds[first]),
    )  # fmt: skip


def _noise(seeds: Sequence[int]) -> list[int]:
    """Seeds of the initial noise of samples, as :func:`align.rollout.rollout.draw` derives them."""
    return [derive(seed, "start") for seed in seeds]
