"""Where a step's samples come from: the policy itself, or stored preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.errors import DataError
from align.inputs import Inputs, encode, read_sample, take
from align.prompts import PAIR, check_media, indices_at, read_pairs, read_prompts
from align.rollout import Rollout, decode, draw, join, stochastic_steps
from align.seeds import derive
from align.timing import Phases
from generators.base import Generator

if TYPE_CHECKING:
    from align.settings import Config, OnlineRollout, PairsRollout

Acting = Callable[[], AbstractContextManager[None]]


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
    """Samples drawn by the role in place when called.

    Args:
        keep: store the stochastic steps of the sampler.
        wants: inputs of the prompts that the reward asks for.

    Raises:
        DataError: prompts that cannot be read, or come without what generator or reward need.
    """

    def __init__(
        self, config: Config, generator: Generator, share: Share, keep: bool, wants: Sequence[str] = ()
    ) -> None:
        assert config.rollout.kind == "online"
        self.settings: OnlineRollout = config.rollout
        self.prompts = read_prompts(config.prompts.train, config.prompts.limit)
        self.generator, self.share, self.keep, self.seed = generator, share, keep, config.seed
        self.wants = wants
        check_media(self.prompts, generator.inputs, generator.pipeline_class)
        check_media(self.prompts, wants, "the reward")

    def __call__(
        self,
        step: int,
        acting: Acting = nullcontext,
        phases: Phases | None = None,
        ready: Callable[[Tensor, list[str], Tensor, Inputs], None] | None = None,
    ) -> Rollout:
        """The rollout of step ``step`` (from 0): ``prompts / world`` prompts with ``group`` samples each.

        Args:
            acting: makes the context in which samples are drawn (the role, the precision).
            phases: what the time is counted in.
            ready: gets media, prompts, group and inputs of each ``chunk`` of samples as soon as they are there.
        """
        phases, settings = phases or Phases(), self.settings
        with phases.phase("rollout"), acting():
            rollout, start = self._planned(step)
            steps = stochastic_steps(settings.sampler, step, self.seed)
            cond = rollout.cond[rollout.row.to(self.generator.device)]
        latents, media, paths = [], [], []
        for rows in torch.arange(len(rollout.seeds)).split(settings.chunk):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            with phases.phase("rollout"), acting():
                part, path = draw(
                    self.generator, cond[rows.to(self.generator.device)], rollout.seeds[some], settings.sampler,
                    start=None if start is None else start[some], steps=steps, keep=self.keep, chunk=settings.chunk,
                )  # fmt: skip
            with phases.phase("decode"):
                seen = decode(self.generator, part, settings.decode_chunk)
            if ready is not None:
                ready(seen, rollout.prompts[some], rollout.group[some], take(rollout.inputs, rows))
            latents.append(part)
            media.append(seen)
            paths += [] if path is None else [path]
        rollout.latents, rollout.media = torch.cat(latents), torch.cat(media)
        rollout.trajectory = join(paths) if paths else None
        return rollout

    def _planned(self, step: int) -> tuple[Rollout, list[int] | None]:
        """The rollout before anything is drawn, and the seeds of the initial noise where a group shares it."""
        settings, generator = self.settings, self.generator
        chosen = indices_at(step, settings.prompts, len(self.prompts), self.seed)
        local = self.share.of(settings.prompts)
        asked = [self.prompts[chosen[i]] for i in local]
        cond, inputs = encode(generator, asked, self.wants)
        group = torch.tensor(list(local)).repeat_interleave(settings.group)
        row = torch.arange(len(asked)).repeat_interleave(settings.group)
        first = local.start * settings.group
        seeds = [derive(self.seed, "rollout", step, first + i) for i in range(len(row))]
        shared = [derive(self.seed, "start", step, int(g)) for g in group] if settings.same_noise else None
        prompts = [asked[i].text for i in row.tolist()]
        wanted = take({name: inputs[name] for name in self.wants}, row)
        none = torch.empty(0)
        return Rollout(prompts, group, seeds, cond, row, none, none, settings.sampler, inputs=wanted), shared


class PairSource:
    """Stored pairs: a table with ``prompt``, ``chosen`` and ``rejected`` (files of pictures, or of clips).

    A pair becomes a group of two with rewards 1 and 0.

    Raises:
        DataError: names file, line and path of what is missing, before any training; of what is unreadable, when read.
    """

    def __init__(
        self, config: Config, generator: Generator, share: Share, keep: bool = False, wants: Sequence[str] = ()
    ) -> None:
        assert config.rollout.kind == "pairs"
        self.settings: PairsRollout = config.rollout
        self.generator, self.share, self.seed = generator, share, config.seed
        self.prompts = read_pairs(self.settings.file)
        check_media(self.prompts, generator.inputs, generator.pipeline_class)

    def __call__(
        self, step: int, acting: Acting = nullcontext, phases: Phases | None = None, ready: Any = None
    ) -> Rollout:
        """The pairs of step ``step`` as a rollout that already has its rewards."""
        with (phases or Phases()).phase("rollout"), acting():
            return self._stored(step)

    def _stored(self, step: int) -> Rollout:
        generator, settings = self.generator, self.settings
        chosen = indices_at(step, settings.prompts, len(self.prompts), self.seed)
        local = self.share.of(settings.prompts)
        pairs = [self.prompts[chosen[i]] for i in local]
        frames = getattr(generator, "frames", None)
        stored = [read_sample(pair, name, generator.size, frames) for pair in pairs for name in PAIR]
        media = torch.stack(stored).to(generator.device)
        with torch.no_grad():
            latents = torch.cat([generator.encode_media(part) for part in media.split(64)])
        cond, _ = encode(generator, pairs)
        row = torch.arange(len(pairs)).repeat_interleave(2)
        group = torch.tensor(list(local)).repeat_interleave(2)
        seeds = [derive(self.seed, "pairs", step, 2 * local.start + i) for i in range(len(row))]
        prompts = [pair.text for pair in pairs for _ in PAIR]
        rollout = Rollout(prompts, group, seeds, cond, row, latents.float(), media)
        rollout.rewards = torch.tensor([1.0, 0.0]).repeat(len(pairs))
        return rollout
