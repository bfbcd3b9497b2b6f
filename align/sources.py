"""Where a step's samples come from: the policy itself, or stored preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.errors import DataError
from align.media import read_image
from align.prompts import indices_at, json_object, read_prompts
from align.rollout import Rollout, decode, draw, stochastic_steps
from align.seeds import derive
from generators.base import Generator

if TYPE_CHECKING:
    from align.settings import Config, OnlineRollout, PairsRollout


@dataclass(frozen=True)
class Share:
    """Which part of the global work this process has: number ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """This process's contiguous share of ``count`` items; raises DataError if it does not divide."""
        if count % self.world:
            raise DataError(f"rollout.prompts: {count} prompts do not divide among {self.world} processes")
        each = count // self.world
        return range(self.rank * each, (self.rank + 1) * each)


class OnlineSource:
    """Samples drawn by the role in place when called."""

    def __init__(self, config: Config, generator: Generator, share: Share, keep: bool) -> None:
        assert config.rollout.kind == "online"
        self.settings: OnlineRollout = config.rollout
        self.prompts = read_prompts(config.prompts.train, config.prompts.limit)
        self.generator, self.share, self.keep, self.seed = generator, share, keep, config.seed

    def __call__(self, step: int) -> Rollout:
        """The rollout of step ``step`` (from 0): ``prompts / world`` prompts with ``group`` samples each."""
        settings, generator = self.settings, self.generator
        chosen = indices_at(step, settings.prompts, len(self.prompts), self.seed)
        local = self.share.of(settings.prompts)
        texts = [self.prompts[chosen[i]] for i in local]
        cond = generator.encode(texts)
        group = torch.tensor(list(local)).repeat_interleave(settings.group)
        row = torch.arange(len(texts)).repeat_interleave(settings.group)
        first = local.start * settings.group
        seeds = [derive(self.seed, "rollout", step, first + i) for i in range(len(row))]
        steps = stochastic_steps(settings.sampler, step, self.seed)
        rows = row.to(generator.device)
        latents, path = draw(
            generator, cond[rows], seeds, settings.sampler, steps=steps, keep=self.keep, chunk=settings.chunk
        )
        prompts = [text for text in texts for _ in range(settings.group)]
        return Rollout(prompts, group, seeds, cond, row, latents, latents[:0], settings.sampler, path)

    def media(self, rollout: Rollout) -> Tensor:
        """Decoded media of the rollout, ``[N, ...]`` in [0, 1]."""
        return decode(self.generator, rollout.latents, self.settings.decode_chunk)


class PairSource:
    """Stored pairs: a JSONL file with ``prompt``, ``chosen`` and ``rejected`` (image paths beside the file).

    A pair becomes a group of two with rewards 1 and 0.

    Raises:
        DataError: names file, line and path of what is missing or unreadable, before any training.
    """

    def __init__(self, config: Config, generator: Generator, share: Share, keep: bool = False) -> None:
        assert config.rollout.kind == "pairs"
        self.settings: PairsRollout = config.rollout
        self.generator, self.share, self.seed = generator, share, config.seed
        path = Path(self.settings.file)
        self.pairs = read_pairs(path)

    def __call__(self, step: int) -> Rollout:
        """The pairs of step ``step`` as a rollout that already has its rewards."""
        generator, settings = self.generator, self.settings
        chosen = indices_at(step, settings.prompts, len(self.pairs), self.seed)
        local = self.share.of(settings.prompts)
        pairs = [self.pairs[chosen[i]] for i in local]
        media = torch.stack([read_image(path, generator.size) for pair in pairs for path in pair[1:]])
        media = media.to(generator.device)
        with torch.no_grad():
            latents = torch.cat([generator.encode_media(part) for part in media.split(64)])
        cond = generator.encode([prompt for prompt, _, _ in pairs])
        row = torch.arange(len(pairs)).repeat_interleave(2)
        group = torch.tensor(list(local)).repeat_interleave(2)
        seeds = [derive(self.seed, "pairs", step, 2 * local.start + i) for i in range(len(row))]
        prompts = [pair[0] for pair in pairs for _ in range(2)]
        rollout = Rollout(prompts, group, seeds, cond, row, latents.float(), media)
        rollout.rewards = torch.tensor([1.0, 0.0]).repeat(len(pairs))
        return rollout

    def media(self, rollout: Rollout) -> Tensor:
        """The stored media."""
        return rollout.media


def read_pairs(path: Path) -> list[tuple[str, Path, Path]]:
    """(prompt, chosen, rejected) of every line; every image is checked to exist."""
    if not path.is_file():
        raise DataError(f"pair file {path} does not exist")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = json_object(line, path, number)
        missing = [key for key in ("prompt", "chosen", "rejected") if not isinstance(row.get(key), str)]
        if missing:
            raise DataError(f"{path} line {number}: needs text under {', '.join(missing)}")
        images = [path.parent / row[key] for key in ("chosen", "rejected")]
        for image in images:
            if not image.is_file():
                raise DataError(f"{path} line {number}: image {image} does not exist")
        pairs.append((row["prompt"], images[0], images[1]))
    if not pairs:
        raise DataError(f"pair file {path} holds no pairs")
    return pairs
