"""FSDP2: every process holds a part of the network, and gathers one block after another while it computes.

Gathering takes all processes, so they call a sharded network equally often and in the same order. While samples are
sampled (:meth:`InStep.uneven`) a process that has fewer calls to make repeats one until the others are done. In the
loss it computes on terms of weight 0, of another process's samples where it has none (:func:`borrowed`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from align.rollout.rollout import Scored, of_samples
from align.training.context import divide
from generators.base import Conditioning, Generator
from generators.experts import Experts
from generators.swap import blocks

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.runs.processes import Processes


def spread(config: Config, generator: Generator, processes: Processes) -> None:
    """Divide the trained networks among the processes: the tokens they compute on, their weights, both or neither."""
    divide(config, generator, processes)
    if processes.sharded:
        shard(generator, processes, config.parallel.replicas)


def shard(generator: Generator, processes: Processes, replicas: int = 1) -> InStep:
    """Leave each process its part of the trained networks, block by block; calls from here on are in step.

    Gradients are added up over the processes, in the parameters' own precision. Weights are computed with as without
    sharding: mixed precision stays with autocast.

    Args:
        replicas: copies of the networks, each spread over as many consecutive processes (HSDP).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    device = processes.accelerator.device.type
    each = processes.world // replicas
    shape, names = ((replicas, each), ("replicate", "shard")) if replicas > 1 else ((each,), ("shard",))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    for network in generator.backbones().values():
        for block in [*blocks(network), network]:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    if isinstance(generator.backbone, Experts):
        generator.backbone.both = True
    return InStep(generator, processes)


class InStep:
    """Unequal numbers of network calls among processes that must make them together.

    Stands in for :meth:`~generators.base.Generator.predict`.
    """

    def __init__(self, generator: Generator, processes: Processes) -> None:
        self.generator, self.processes, self.predict = generator, processes, generator.predict
        self.group = distributed.new_group(backend="gloo")
        self.example: tuple[Tensor, Tensor, Conditioning] | None = None
        self.counting = False
        generator.predict = self  # type: ignore[method-assign]
        processes.uneven = self.uneven  # type: ignore[method-assign]

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if self.counting:
            if self.example is None:
                row = torch.zeros(1, dtype=torch.long, device=x.device)
                self.example = (x[row].detach(), t[row], cond[row])
            self._others(True)
        try:
            return self.predict(x, t, cond)
        except Exception:
            self.processes.lost = True
            raise

    @contextmanager
    def uneven(self, acting: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """Inside the block a process calls the network as often as it likes, without gradient and as one role.

        A process that is done, or failed outside the network, takes part in the calls of the others until they are.

        Args:
            acting: makes the context of those calls: role and precision.
        """
        self.counting = True
        try:
            yield
        finally:
            if not self.processes.lost:
                with torch.no_grad(), acting():
                    while self._others(False):
                        assert self.example is not None
                        self.predict(*self.example)
            self.counting = False

    def _others(self, calling: bool) -> bool:
        """Whether any process is about to call; all that do not know an example of a call are then given one."""
        mine = torch.tensor([calling, self.example is None])
        found = [torch.empty_like(mine) for _ in range(self.processes.world)]
        distributed.all_gather(found, mine, group=self.group)
        callers = [rank for rank, (calls, _) in enumerate(found) if calls]
        if callers and any(bool(lacks) for _, lacks in found):
            sent = [packed(self.example) if callers[0] == self.processes.rank else None]
            distributed.broadcast_object_list(sent, src=callers[0], group=self.group)
            if self.example is None and sent[0] is not None:
                self.example = unpacked(sent[0], self.generator.device)
        return bool(callers)


def borrowed(processes: Processes, rollout: Scored, credit: Tensor, sample: int | None) -> tuple[Scored, Tensor] | None:
    """A whole group of another process's samples, with its credit, for a process that has nothing to compute on.

    Every process must call it.

    Args:
        sample: row of the rollout whose group may be lent; None if there is nothing to compute on.

    Returns:
        None for a process that has something, and where no process has.
    """
    offers = processes.objects([sample is not None])
    if all(offers) or not any(offers):
        return None
    owner = offers.index(True)
    mine = None
    if owner == processes.share.rank:
        rows = (rollout.group == rollout.group[sample]).nonzero().flatten()
        mine = packed((of_samples(rollout, rows), credit[rows]))
    sent = processes.sent(mine, owner)
    return unpacked(sent, processes.accelerator.device) if sample is None else None


def packed(value: Any) -> bytes:
    """A value with tensors in it, to be sent to another process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(sent: bytes, device: torch.device) -> Any:
    """The tensors that were given to :func:`packed`; those of a card are moved to this process's ``device``."""
    where = {f"cuda:{index}": str(device) for index in range(torch.cuda.device_count())}
    return torch.load(io.BytesIO(sent), weights_only=False, map_location=where)
