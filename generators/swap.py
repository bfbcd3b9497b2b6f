"""Frozen weights of some blocks in the CPU's memory, copied to the card when their block computes.

All copies go to the card: frozen weights have no gradients, so the CPU's copy never changes. While a block computes,
the weights of the next swapped block are copied on a second stream. Backward needs a block's weights once more: with
gradient checkpointing its forward pass is repeated there, which copies them again.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from generators.errors import GeneratorError
from generators.pinned import to_host


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network as its class names them; none where it does not."""
    model: Any = network
    names = {*(getattr(model, "_repeated_blocks", None) or ()), *(getattr(model, "_no_split_modules", None) or ())}
    found = [module for module in network.modules() if type(module).__name__ in names and module is not network]
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in inner]


def spread(total: int, count: int) -> list[int]:
    """``count`` of the numbers below ``total``, as evenly spaced as can be, so that a copy has time between them."""
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


class Swap:
    """The swapped blocks of one network, each of which holds its weights on the device while it computes.

    At most two of them are on the device: the one that computes, and the next in the direction of the last two.

    Args:
        network: loaded on the CPU. All its other weights are moved to ``device`` here.
        count: number of blocks that are swapped, spread evenly.

    Raises:
        GeneratorError: the class names no blocks, or has fewer than ``count``.
    """

    def __init__(self, network: nn.Module, count: int, device: torch.device) -> None:
        found = blocks(network)
        if len(found) < count:
            known = f"{type(network).__name__} names {len(found)} blocks" if found else "its class names no blocks"
            raise GeneratorError(f"memory.swap_blocks {count}: {known}; use a smaller number, or 0")
        self.device, self.blocks = device, [found[number] for number in spread(len(found), count)]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parameters = [list(block.parameters()) for block in self.blocks]
        swapped = {id(value) for some in self.parameters for value in some}
        for module in network.modules():
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if id(value) not in swapped:
                    value.data = value.data.to(device)
        self.host = [[to_host(value.data, device=device) for value in some] for some in self.parameters]
        self.fetched: dict[int, tuple[list[Tensor], Any]] = {}
        self.before = -1
        for number, block in enumerate(self.blocks):
            for value, kept in zip(self.parameters[number], self.host[number], strict=True):
                value.data = kept
            block.register_forward_pre_hook(lambda *_, number=number: self.enter(number))
            block.register_forward_hook(lambda *_, number=number: self.leave(number), always_call=True)

    def enter(self, number: int) -> None:
        """Put the weights of a block on the device, and start to copy those of the next."""
        back = number in (self.before, self.before - 1)
        self.before = number
        for other in [key for key in self.fetched if key != number]:
            del self.fetched[other]  # copied for a pass that took another way
        self._fetch(number)
        values, ready = self.fetched.pop(number)
        if self.stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(ready)
            for value in values:
                value.record_stream(now)
        for parameter, value in zip(self.parameters[number], values, strict=True):
            parameter.data = value
        following = number - 1 if back else number + 1
        if 0 <= following < len(self.blocks):
            self._fetch(following)

    def leave(self, number: int) -> None:
        """Give the block its CPU weights back. What a graph saved of the others lives as long as the graph."""
        for parameter, kept in zip(self.parameters[number], self.host[number], strict=True):
            parameter.data = kept

    def _fetch(self, number: int) -> None:
        if number in self.fetched:
            return
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            values = [kept.to(self.device, non_blocking=True, copy=True) for kept in self.host[number]]
            self.fetched[number] = values, None if self.stream is None else self.stream.record_event()
