"""The processes of a run: the share of work of each, and how their results are combined.

Every method that exchanges something must be called by every process, equally often and in the same order. A process
may hold nothing: fewer samples than the others, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed, nn

from align.config import sharding
from align.policy.shards import is_shard
from alignflow.errors import TrainingError
from rewards.base import Scores

BATCH = 2**24
"""Gradients added up over the processes at a time."""

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Part of the global work that this process has: number ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """This process's contiguous share of ``count`` items: one more for the first ones, maybe none for the last."""
        each, more = divmod(count, self.world)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def owner(self, item: int, count: int) -> int:
        """Rank of the process whose share of ``count`` items holds this one."""
        return next(rank for rank in range(self.world) if item in Share(rank, self.world).of(count))


class Processes:
    """Exchanges between the processes of one accelerator.

    Args:
        context: consecutive processes that compute the same samples together, each a part of the tokens (see
            :mod:`align.training.context`). They have one share of the work, and what each of them holds of a sample is
            the same, so results are combined from the first of each group alone.

    Attributes:
        world: all processes, of which this one is number ``rank``.
        share: the work of this process's group.
        leads: this process is the first of its group.
        group: of the processes that compute the same samples together; None where each computes alone.
        divided: ids of parameters whose gradient each process of a group has a part of. That of any other parameter is
            whole in each of them.
        sharded: every process holds a part of the trained network, see :mod:`align.training.sharding`.
        lost: this process failed inside a network that all call together, so nothing more can be exchanged.
    """

    def __init__(self, accelerator: Accelerator, context: int = 1) -> None:
        self.accelerator, self.context = accelerator, context
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.share = Share(self.rank // context, self.world // context)
        self.leads = self.rank % context == 0
        self.group: distributed.ProcessGroup | None = None
        self.divided: frozenset[int] = frozenset()
        self.sharded, self.lost = sharding.asked() and self.world > 1, False

    def uneven(self, acting: Callable[[], AbstractContextManager[None]] = nullcontext) -> AbstractContextManager[None]:
        """Context in which processes call the network unequally often; see
        :meth:`align.training.sharding.InStep.uneven`, which stands in for this where networks are sharded."""
        return nullcontext()

    def objects(self, mine: list[Any]) -> list[Any]:
        """The lists of all shares as one, in their order."""
        if self.world == 1:
            return mine
        return [item for one in gather_object([mine])[:: self.context] for item in one]

    def sent(self, value: Any, owner: int) -> Any:
        """The value of the processes of share ``owner``; the others' ``value`` is ignored."""
        if self.world == 1:
            return value
        return broadcast_object_list([value], from_process=owner * self.context)[0]

    def led(self, value: T) -> T:
        """The value of the first process of this process's group; the others' ``value`` is ignored."""
        return value if self.context == 1 else gather_object([value])[self.rank - self.rank % self.context]

    def agreed(self, scores: Scores) -> Scores:
        """Scores without those that are missing in another process of this process's group.

        The processes of a group take the gradient of one loss together, so they must leave out the same samples.
        """
        if self.group is None:
            return scores
        lost = scores.values.detach().isnan().to(self.accelerator.device, torch.int32)
        distributed.all_reduce(lost, distributed.ReduceOp.MAX, group=self.group)
        missing = lost.bool().to(scores.values.device)
        values = torch.where(missing, math.nan, scores.values)
        elsewhere = "missing in another process that computes the same sample"
        reasons = {**dict.fromkeys(missing.nonzero().flatten().tolist(), elsewhere), **scores.reasons}
        return replace(scores, values=values.detach() if missing.all() else values, reasons=reasons)

    def settled(self, work: Callable[[], T]) -> T:
        """The result of ``work`` in the main process, in every process; its errors are raised in every process."""
        if self.world == 1:
            return work()
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = work()
            except Exception as error:
                found[1] = error
        value, failure = broadcast_object_list(found, from_process=0)
        if failure is not None:
            raise failure
        return value

    def gather(self, values: Tensor) -> Tensor:
        """``[N_share, ...]`` of each share -> ``[N, ...]`` of all, on the CPU; the rest of the shape may be unknown to
        a process that holds none."""
        if self.world == 1:
            return values.cpu()
        shapes = self.objects([tuple(values.shape)])
        rest = next((shape[1:] for shape in shapes if shape[0]), shapes[0][1:])
        longest = max(shape[0] for shape in shapes)
        padded = values.new_zeros((longest, *rest), device=self.accelerator.device)
        if len(values):
            padded[: len(values)] = values.to(padded.device)
        parts = [padded.cpu()] * len(shapes)
        if longest:
            parts = list(self.accelerator.gather(padded).cpu().split(longest))[:: self.context]
        return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])

    def gather_scores(self, scores: Scores) -> Scores:
        """Scores of all shares' samples, on the CPU; a process without samples has none of the parts."""
        if self.world == 1:
            parts = {name: column.cpu() for name, column in scores.parts.items()}
            return Scores(self.gather(scores.values), scores.reasons, parts, scores.steps)
        counts = self.objects([len(scores.values)])
        before = sum(counts[: self.share.rank])
        mine = {before + index: why for index, why in scores.reasons.items()}
        reasons = {index: why for one in self.objects([mine]) for index, why in one.items()}
        names = dict.fromkeys(name for one in self.objects([list(scores.parts)]) for name in one)
        missing = torch.full((len(scores.values),), math.nan)
        parts = {name: self.gather(scores.parts.get(name, missing).detach()) for name in names}
        stepped = any(self.objects([scores.steps is not None]))
        steps = self.gather(scores.steps if scores.steps is not None else torch.empty(0)) if stepped else None
        return Scores(self.gather(scores.values), reasons, parts, steps)

    def add(self, values: Tensor) -> Tensor:
        """The sum of every share's tensor, all of one shape, on the CPU."""
        if self.world == 1:
            return values.cpu()
        return self._sum(values if self.leads else torch.zeros_like(values))

    def _sum(self, values: Tensor) -> Tensor:
        """The sum of every process's tensor, all of one shape, on the CPU."""
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum").cpu()  # type: ignore[union-attr]

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every process's gradients the sum of all; a parameter has one where any process computed it.

        This stands in for DistributedDataParallel, which waits for a backward pass of every process through every
        parameter: a process without samples, or an expert that no sample reaches, has none. Those of shards have been
        added up in the backward pass.

        Processes that compute the same samples together have a part each of a gradient in :attr:`divided`, so these
        parts are added up like those of other samples. Of any other gradient each has the whole, and the first one's
        counts.
        """
        parameters = [parameter for parameter in parameters if not is_shard(parameter)]
        if self.world == 1 or not parameters:
            return
        for parameter in parameters if not self.leads else ():
            if parameter.grad is not None and id(parameter) not in self.divided:
                parameter.grad.zero_()
        given = self._sum(torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32))
        there = [parameter for parameter, known in zip(parameters, given.tolist(), strict=True) if known]
        for some in _batches(there):
            for parameter in some:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in some if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums of numbers by name; a name that a process lacks counts as 0 there."""
        if self.world == 1:
            return dict(values)
        found: dict[str, float] = {}
        for one in self.objects([values]):
            for name, value in one.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def means(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """:meth:`mean` by name; a process may lack a name."""
        mine = {name: column.detach().float().cpu() for name, column in values.items()}
        everyone = self.objects([mine])
        names = dict.fromkeys(name for one in everyone for name in one)
        columns = {name: torch.cat([one[name] for one in everyone if name in one]) for name in names}
        return {name: mean(column) for name, column in columns.items()}

    def mean(self, values: Tensor) -> float:
        """Mean of the finite values of all shares, NaN if there is none."""
        return mean(self.gather(values.detach().float()))

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work``, which exchanges nothing. If it fails in one process, it fails in all.

        Raises:
            TrainingError: it failed in another process.
        """
        error: Exception | None = None
        try:
            found = work()
        except Exception as failed:
            if self.lost:
                raise
            error = failed
        if self.any(error is not None):
            raise error or TrainingError("another process stopped in this step; its output has the reason")
        return found

    def any(self, mine: bool) -> bool:
        """Whether it is true in any process: a signal may reach one of them first."""
        return mine if self.world == 1 else bool(self._sum(torch.tensor([int(mine)])).any())


def mean(values: Tensor) -> float:
    """Mean of the finite ones of ``values [N]``, NaN if there is none."""
    known = values[values.isfinite()]
    return float(known.mean()) if len(known) else math.nan


def _batches(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype, in their order, :data:`BATCH` numbers at a time and one parameter at least."""
    batch: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(one.numel() for one in batch) + parameter.numel() > BATCH
        if batch and (full or parameter.dtype != batch[0].dtype):
            yield batch
            batch = []
        batch.append(parameter)
    if batch:
        yield batch
