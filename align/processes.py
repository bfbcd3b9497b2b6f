"""The processes of a run: which share of the work each has, and how their results come together.

Every method that exchanges something must be called by every process, equally often and in the same order. A process
may hold nothing: fewer samples than the others, or none.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Which part of the global work this process has: number ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """This process's contiguous share of ``count`` items: sizes differ by one at most, and may be 0."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def owner(self, item: int, count: int) -> int:
        """Rank of the process whose share of ``count`` items holds this one."""
        return next(rank for rank in range(self.world) if item in Share(rank, self.world).of(count))


class Processes:
    """What the processes of one accelerator exchange."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.share = Share(accelerator.process_index, accelerator.num_processes)

    def objects(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes as one, in the order of the processes."""
        return mine if self.share.world == 1 else gather_object(mine)

    def sent(self, value: Any, owner: int) -> Any:
        """What the process of rank ``owner`` holds; the others' ``value`` is ignored."""
        if self.share.world == 1:
            return value
        return broadcast_object_list([value], from_process=owner)[0]

    def gather(self, values: Tensor) -> Tensor:
        """``[N_rank, ...]`` of each process -> ``[N, ...]`` of all, on the CPU; the rest of the shape may be unknown to
        a process that holds none."""
        if self.share.world == 1:
            return values.cpu()
        shapes = self.objects([tuple(values.shape)])
        rest = next((shape[1:] for shape in shapes if shape[0]), shapes[0][1:])
        longest = max(shape[0] for shape in shapes)
        padded = values.new_zeros((longest, *rest), device=self.accelerator.device)
        if len(values):
            padded[: len(values)] = values.to(padded.device)
        parts = self.accelerator.gather(padded).cpu().split(longest) if longest else [padded.cpu()] * len(shapes)
        return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])

    def add(self, values: Tensor) -> Tensor:
        """The sum of every process's tensor, all of one shape."""
        if self.share.world == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum").cpu()  # type: ignore[union-attr]

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """The sums of numbers by name; a name that a process lacks counts as 0 there."""
        if self.share.world == 1:
            return values
        found: dict[str, float] = {}
        for one in self.objects([values]):
            for name, value in one.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def mean(self, values: Tensor) -> float:
        """Mean of the finite values of all processes, NaN where there is none."""
        known = self.gather(values.detach().float())
        known = known[known.isfinite()]
        return float(known.mean()) if len(known) else math.nan

    def any(self, mine: bool) -> bool:
        """Whether any process says so: a signal may reach one of them first."""
        return mine if self.share.world == 1 else bool(self.gather(torch.tensor([mine])).any())

    def no_sync(self, network: Any, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged over the processes in the last backward pass of an update alone."""
        return nullcontext() if last else self.accelerator.no_sync(network)
