"""Tensors of which every process holds a part (DTensors): the part, the whole, and values put in place.

A plain tensor is its own part and whole, so callers need not know which they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_shard(value: Any) -> bool:
    """Whether other processes hold the rest of this tensor."""
    return hasattr(value, "full_tensor")


def part(value: Tensor) -> Tensor:
    """This process's part of a tensor, without gradient; shares its memory."""
    held: Any = value.detach()
    return held.to_local() if is_shard(held) else held


def whole(value: Tensor) -> Tensor:
    """All of a tensor, without gradient. Every process must call it for a shard, in the same order."""
    held: Any = value.detach()
    return held.full_tensor() if is_shard(held) else held


def part_of(value: Tensor, mine: Tensor) -> Tensor:
    """The part of a whole ``value`` that this process holds where its share of it is ``mine``."""
    if not is_shard(mine):
        return value
    from torch.distributed.tensor import distribute_tensor

    shard: Any = mine
    placed = value.to(shard.device)
    return distribute_tensor(placed, shard.device_mesh, shard.placements, src_data_rank=None)


def gathered(state: Any) -> Any:
    """Plain values with every shard in them replaced by the whole tensor on the CPU; a call of all processes."""
    if isinstance(state, Tensor):
        return whole(state).cpu() if is_shard(state) else state
    if isinstance(state, Mapping):
        return {key: gathered(value) for key, value in state.items()}
    return [gathered(value) for value in state] if isinstance(state, list) else state


@contextmanager
def put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block the parameters have these values. Call it under ``no_grad``.

    A plain parameter refers to the value meanwhile, which an open graph of it survives. Processes gather a sharded one
    from the memory it had from the start, so there the numbers change places: inside the block ``values`` hold the
    parameter's.
    """
    before = [parameter.data for parameter in parameters]
    _exchange(parameters, values, values)
    try:
        yield
    finally:
        _exchange(parameters, values, before)


@torch.no_grad()
def _exchange(parameters: Sequence[nn.Parameter], shards: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    for parameter, shard, value in zip(parameters, shards, plain, strict=True):
        if is_shard(parameter):
            mine, other = part(parameter), part(shard)
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)
        else:
            parameter.data = value


def bare(network: nn.Module) -> nn.Module:
    """A network of the original class with all of the weights, on the CPU; a call of all processes where it is sharded.

    A network that is not sharded is returned as it is.
    """
    if not any(is_shard(value) for value in network.parameters()):
        return network
    state = {name: whole(value).cpu() for name, value in network.state_dict().items()}
    model: Any = network
    original: Any = type(network).__mro__[2]  # fully_shard puts its own class, and FSDPModule, before it
    with torch.device("meta"):
        found = original.from_config(model.config)
    found.load_state_dict(state, assign=True)
    return found
