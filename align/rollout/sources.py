"""Sources of a step's samples: the policy itself, or a table of stored pairs or samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.data.inputs import Inputs, encode, read_sample, take
from align.data.prompts import Prompt, check_media, indices_at, read_prompts, read_stored
from align.data.screening import Needs
from align.maths.seeds import derive
from align.rollout.rollout import Asked, Drawn, Scored, decode, draw, join, nothing_asked, stochastic_steps
from align.training.processes import Share
from align.training.timing import Phases
from alignflow.errors import DataError, TrainingError
from generators.base import Generator
from rewards.base import Scores

if TYPE_CHECKING:
    from align.config.settings import Config, OnlineRollout, PairsRollout, SamplesRollout

Acting = Callable[[], AbstractContextManager[None]]


class OnlineSource:
    """Samples drawn by the role in place when called.

    Args:
        needs: of the recipe; see :attr:`align.recipes.base.Recipe.needs`.
        wants: inputs of the prompts that the reward asks for.

    Raises:
        DataError: prompts that cannot be read, or come without what generator or reward need.
    """

    def __init__(
        self, config: Config, generator: Generator, share: Share, needs: Collection[str] = (), wants: Sequence[str] = ()
    ) -> None:
        assert config.rollout.kind == "online"
        self.settings: OnlineRollout = config.rollout
        self.banned: list[str] = []
        """Places of the prompts that a filter took out for good, which checkpoints keep."""
        self.skipped: dict[str, str] = {}
        skip = config.prompts.bad == "skip"
        self.prompts = read_prompts(config.prompts.train, config.prompts.limit, skipped=self.skipped if skip else None)
        self.generator, self.share, self.seed = generator, share, config.seed
        self.drawn, self.kept = "reward_gradient" not in needs, "trajectory" in needs
        self.predictions = bool({"predictions", "step_scores"} & set(needs))
        self.wants = wants
        if not skip:
            check_media(self.prompts, generator.inputs, generator.pipeline_class)
            check_media(self.prompts, wants, "the reward")

    @property
    def needs(self) -> Needs:
        """What is read of every prompt."""
        return Needs(tuple(dict.fromkeys((*self.generator.inputs, *self.wants))), ())

    def leave_out(self, places: Collection[str]) -> None:
        """Use no prompt that stands at one of ``places``."""
        self.prompts = [prompt for prompt in self.prompts if prompt.place not in places]

    def ban(self, step: int, groups: Sequence[int]) -> None:
        """Sample the prompts of these groups of rollout ``step`` no more.

        Raises:
            TrainingError: no prompt would be left.
        """
        chosen = indices_at(step, self.settings.prompts, len(self.prompts), self.seed)
        self.ban_places([self.prompts[chosen[number]].place for number in groups])

    def ban_places(self, places: Sequence[str]) -> None:
        """Sample no prompt that stands at one of ``places`` any more; raises as :meth:`ban`."""
        self.banned += places
        self.leave_out(places)
        if not self.prompts:
            raise TrainingError(
                "rollout.filter has banned every training prompt, so nothing is left to train on; give more prompts, "
                "or set rollout.filter.ban: false"
            )

    def __call__(
        self,
        step: int,
        acting: Acting = nullcontext,
        phases: Phases | None = None,
        ready: Callable[[Tensor, list[str], Tensor, Inputs], None] | None = None,
    ) -> Drawn:
        """The rollout of step ``step`` (from 0): this process's share of the prompts with ``group`` samples each.

        A recipe that follows the reward's gradient samples in its loss: its rollout holds the noise and no media.

        Args:
            acting: makes the context in which samples are drawn (the role, the precision).
            phases: what the time is counted in.
            ready: gets media, prompts, group and inputs of each ``chunk`` of samples as soon as they are there.
        """
        phases, settings = phases or Phases(), self.settings
        if not self.share.of(settings.prompts):
            return nothing_asked(settings.sampler).become(Drawn, latents=torch.empty(0), media=torch.empty(0))
        with phases.phase("rollout"), acting():
            asked, start = self._asked(step)
            if not self.drawn:
                start = start or [derive(seed, "start") for seed in asked.seeds]
                return asked.become(Drawn, latents=self.generator.noise(start), media=torch.empty(0))
        latents, media, paths = [], [], []
        for rows in torch.arange(len(asked.seeds)).split(settings.chunk):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            with phases.phase("rollout"), acting():
                part, path = draw(
                    self.generator, asked.cond, asked.seeds[some], settings.sampler, row=asked.row[some],
                    start=None if start is None else start[some], steps=asked.steps, keep=self.kept,
                    predictions=self.predictions, chunk=settings.chunk,
                )  # fmt: skip
            with phases.phase("decode"):
                seen = decode(self.generator, part, settings.decode_chunk).cpu()
            if ready is not None:
                ready(seen, asked.prompts[some], asked.group[some], take(asked.inputs, rows))
            latents.append(part)
            media.append(seen)
            paths += [] if path is None else [path]
        trajectory = join(paths) if paths else None
        return asked.become(Drawn, latents=torch.cat(latents), media=torch.cat(media), trajectory=trajectory)

    def _asked(self, step: int) -> tuple[Asked, list[int] | None]:
        """The prompts of a step, and the seeds of the initial noise where a group shares it."""
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
        one = Asked(
            prompts=prompts, group=group, seeds=seeds, cond=cond, row=row, sampler=settings.sampler, inputs=wanted,
            seed=derive(self.seed, "rollout", step), steps=stochastic_steps(settings.sampler, step, self.seed),
        )  # fmt: skip
        return one, shared


class StoredSource:
    """A table's pictures or clips, with their rewards: the better of a pair has 1 and the other 0.

    A row is a group of its own, but samples that are compared by their rewards are one group, over all processes.

    Raises:
        DataError: names file, line and path of what is missing, before any training; of what is unreadable, when read.
    """

    def __init__(
        self, config: Config, generator: Generator, share: Share, needs: Collection[str] = (), wants: Sequence[str] = ()
    ) -> None:
        assert config.rollout.kind != "online"
        self.settings: PairsRollout | SamplesRollout = config.rollout
        self.generator, self.share, self.seed = generator, share, config.seed
        self.by_reward = self.settings.kind == "samples" and self.settings.by_reward
        self.skipped: dict[str, str] = {}
        skip = config.prompts.bad == "skip"
        self.prompts, self.rewards = [], []
        for prompt in read_stored(self.settings.file, self.settings.columns, self.skipped if skip else None):
            try:
                self.rewards.append(self._rewards(prompt))
            except DataError as error:
                if not skip:
                    raise
                self.skipped[prompt.place] = str(error)
            else:
                self.prompts.append(prompt)
        if not skip:
            check_media(self.prompts, generator.inputs, generator.pipeline_class)

    @property
    def needs(self) -> Needs:
        """What is read of every row."""
        return Needs(tuple(self.generator.inputs), tuple(self.settings.columns))

    def leave_out(self, places: Collection[str]) -> None:
        """Use no row that stands at one of ``places``."""
        kept = [number for number, prompt in enumerate(self.prompts) if prompt.place not in places]
        self.prompts = [self.prompts[number] for number in kept]
        self.rewards = [self.rewards[number] for number in kept]

    def __call__(
        self, step: int, acting: Acting = nullcontext, phases: Phases | None = None, ready: Any = None
    ) -> Scored:
        """The rows of step ``step``, with their rewards."""
        if not self.share.of(self.settings.prompts):
            empty = torch.empty(0)
            return nothing_asked(None).become(Scored, latents=empty, media=empty, scores=Scores(empty))
        with (phases or Phases()).phase("rollout"), acting():
            return self._stored(step)

    def _rewards(self, prompt: Prompt) -> list[float]:
        if self.settings.kind == "pairs":
            return [1.0, 0.0]
        if not self.by_reward:
            return [1.0]
        value = prompt.metadata.get("reward")
        # an int may have any number of digits
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e308 < value < 1e308:
            raise DataError(f'{prompt.where}: rollout.by_reward needs a number under "reward", given {value!r:.80}')
        return [float(value)]

    def _stored(self, step: int) -> Scored:
        generator, settings = self.generator, self.settings
        chosen = indices_at(step, settings.prompts, len(self.prompts), self.seed)
        local, size = self.share.of(settings.prompts), settings.group
        rows = [self.prompts[chosen[i]] for i in local]
        frames = getattr(generator, "frames", None)
        stored = [read_sample(row, name, generator.size, frames) for row in rows for name in settings.columns]
        media = torch.stack(stored)
        with torch.no_grad():
            latents = torch.cat([generator.encode_media(part) for part in media.to(generator.device).split(64)])
        cond, _ = encode(generator, rows)
        row = torch.arange(len(rows)).repeat_interleave(size)
        group = torch.tensor([0 if self.by_reward else i for i in local]).repeat_interleave(size)
        seeds = [derive(self.seed, settings.kind, step, size * local.start + i) for i in range(len(row))]
        prompts = [rows[i].text for i in row.tolist()]
        rewards = torch.tensor([value for i in local for value in self.rewards[chosen[i]]])
        asked = Asked(prompts=prompts, group=group, seeds=seeds, cond=cond, row=row)
        return asked.become(Scored, latents=latents.float(), media=media, scores=Scores(rewards))
