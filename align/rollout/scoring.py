"""Scoring of a rollout in chunks, immediately or in a thread while the next samples are generated.

The pieces are the same either way, so that overlapping changes no score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from align.data.inputs import take
from align.data.media import from_bytes, to_bytes
from align.rollout.rollout import Drawn
from align.runs.processes import Processes
from generators.base import Generator
from generators.pinned import to_device
from rewards.base import Reward, RewardError, Scope, Scores
from rewards.parts import Part, joined


class Scoring:
    """The scores of one rollout, whose samples come in order.

    Args:
        reward: its scope decides which samples must be scored together.
        thread: where it does; None = when the scores are asked for.
        device: on which media are scored; they wait on the CPU.
        processes: those that share the rollout, for a reward that compares all samples of a batch. Of those that
            compute the same samples together only the first scores; see :meth:`Processes.led`.
        counted: is called with the number of scored samples, and of all, as they come.
    """

    def __init__(
        self,
        reward: Reward,
        thread: ThreadPoolExecutor | None = None,
        processes: Processes | None = None,
        device: torch.device | str = "cpu",
        counted: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        self.reward, self.thread, self.device, self.counted = reward, thread, device, counted
        self.processes = processes if reward.scope == "batch" and processes and processes.share.world > 1 else None
        self.idle = processes is not None and self.processes is None and not processes.leads
        self.parts: list[Part] = []
        self.futures: list[Future[Scores]] = []
        self.waiting: list[Part] = []
        self.count = 0
        self.lost: dict[int, str] = {}

    def add(
        self,
        media: Tensor,
        prompts: Sequence[str],
        group: Tensor,
        inputs: Mapping[str, Any],
        lost: Mapping[int, str] | None = None,
    ) -> None:
        """The next samples, uint8 media; a prompt's samples follow one another.

        Args:
            lost: which of them have no score, and why.
        """
        if self.idle:
            return
        rows = list(range(self.count, self.count + len(prompts)))
        self.lost |= {self.count + number: why for number, why in (lost or {}).items()}
        self.count += len(prompts)
        self.waiting.append(Part(rows, media, list(prompts), group, dict(inputs)))
        if self.reward.scope == "sample":
            self._start(self.waiting)
            self.waiting = []
        elif self.reward.scope == "group":
            whole = _merge(self.waiting)
            assert whole.group is not None
            open_ = int((whole.group == whole.group[-1]).nonzero()[0])  # more of the last prompt may come
            self._start([_slice(whole, slice(0, open_))])
            self.waiting = [_slice(whole, slice(open_, None))]

    def scores(self) -> Scores:
        """Scores of all samples, when they are there; raises what the reward raised. Lost samples have none.

        A process that is not the first of those that compute the same samples has no scores.
        """
        if self.processes is not None:
            return without(self._among(self.processes), self.lost)
        self._start(self.waiting)
        self.waiting = []
        found: list[Scores] = []
        for number, part in enumerate(self.parts):
            self.counted(sum(len(one.rows) for one in self.parts[:number]), self.count)
            found.append(self.futures[number].result() if self.futures else self._score(part))
        return without(joined(self.parts, found), self.lost)

    def wait(self) -> None:
        """Wait until nothing is being scored."""
        for future in self.futures:
            future.exception()

    def _among(self, processes: Processes) -> Scores:
        """This process's scores in the batch of all processes, which the main process scores as one."""
        mine = (
            _merge(self.waiting) if self.waiting else Part([], torch.empty(0), [], torch.empty(0, dtype=torch.long), {})
        )
        assert mine.group is not None
        media, group = processes.gather(mine.media), processes.gather(mine.group)
        prompts, counts = processes.objects(mine.prompts), processes.objects([len(mine.prompts)])
        shared = processes.objects([mine.inputs])
        names = dict.fromkeys(name for inputs in shared for name in inputs)
        inputs = {name: _cat([one[name] for one in shared if name in one]) for name in names}
        whole = Part(list(range(len(prompts))), media, prompts, group, inputs)
        scores = processes.settled(lambda: self._score(whole))
        start = sum(counts[: processes.share.rank])
        return scores.rows(start, start + counts[processes.share.rank])

    def _start(self, parts: Sequence[Part]) -> None:
        if not any(part.rows for part in parts):
            return
        part = _merge(parts)
        self.parts.append(part)
        if self.thread is not None:
            self.futures.append(self.thread.submit(self._score, part))

    def _score(self, part: Part) -> Scores:
        return self.reward(from_bytes(part.media.to(self.device)), part.prompts, part.group, part.inputs)


@torch.no_grad()
def scores_by_step(generator: Generator, reward: Reward, drawn: Drawn, chunk: int) -> Tensor:
    """Scores ``[N, S]`` of the clean samples that the S stochastic steps predict, NaN if one is missing.

    Args:
        reward: must score samples one by one.
        chunk: samples decoded and scored at a time.
    """
    path = drawn.trajectory
    assert path is not None
    assert path.x0 is not None
    columns = []
    for x0 in path.x0.unbind(1):
        found = []
        for rows in torch.arange(len(x0)).split(chunk):
            prompts = [drawn.prompts[n] for n in rows.tolist()]
            media = generator.decode(to_device(x0[rows], generator.device))
            media = from_bytes(to_bytes(media))  # as the scores of the samples are of uint8 media
            found.append(reward(media, prompts, drawn.group[rows], take(drawn.inputs, rows)).values.cpu())
        columns.append(torch.cat(found))
    return torch.stack(columns, 1)


def without(scores: Scores, lost: Mapping[int, str]) -> Scores:
    """The scores, missing for the samples of ``lost``, for the reasons there."""
    if not lost:
        return scores
    values, parts = scores.values.clone(), {name: value.clone() for name, value in scores.parts.items()}
    for column in (values, *parts.values()):
        column[list(lost)] = torch.nan
    return replace(scores, values=values, reasons={**scores.reasons, **lost}, parts=parts)


def _merge(parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    groups = [part.group for part in parts if part.group is not None]
    inputs = {name: _cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    rows, prompts = ([item for part in parts for item in getattr(part, name)] for name in ("rows", "prompts"))
    return Part(rows, torch.cat([part.media for part in parts]), prompts, torch.cat(groups), inputs)


def _slice(part: Part, some: slice) -> Part:
    assert part.group is not None
    index = torch.arange(len(part.rows))[some]
    return Part(part.rows[some], part.media[some], part.prompts[some], part.group[some], take(part.inputs, index))


def _cat(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else [item for value in values for item in value]


def check_gradient(recipe: str, reward: Reward, scope: Scope = "sample") -> None:
    """Raise RewardError if a recipe cannot follow the gradient of a built reward, which settings did not show.

    Args:
        scope: that the settings showed; the config was checked with it.
    """
    if not reward.differentiable:
        own = "a function or class of your own declares one by differentiable: true"
        raise RewardError(f"recipe {recipe} follows the reward's gradient, and reward {reward.name!r} has none; {own}")
    if reward.scope not in ("sample", scope):
        raise RewardError(f"recipe {recipe} scores samples chunk by chunk, and reward {reward.name!r} compares samples")
    if reward.refresh is not None:
        raise RewardError(
            f"recipe {recipe} scores in its loss, and reward {reward.name!r} learns from scored rollouts: use another "
            "recipe, such as grpo"
        )
