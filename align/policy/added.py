"""Modules that a policy adds to the blocks of a frozen network; only these are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from generators.base import Generator


class Added(nn.Module):
    """Module that is added to a block. Its parameters are trained; tensors that it is given are buffers.

    Attributes:
        on: whether it takes part in what the network computes.
    """

    on = True


def added(generator: Generator) -> dict[str, Added]:
    """Name in the backbone -> module, in the order of the network."""
    found = ((name, module) for name, module in generator.backbone.named_modules() if isinstance(module, Added))
    return dict(found)


def added_parameters(generator: Generator) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that was added."""
    modules = added(generator).items()
    return [(f"{name}.{key}", value) for name, module in modules for key, value in module.named_parameters()]


@contextmanager
def added_off(generator: Generator) -> Iterator[None]:
    """Inside the block the generator computes as the base, bit for bit."""
    modules = [module for module in added(generator).values() if module.on]
    for module in modules:
        module.on = False
    try:
        yield
    finally:
        for module in modules:
            module.on = True


def block_of(layer: str) -> str:
    """Name of the repeated block that holds a layer; "" for a layer outside of all blocks."""
    parts = layer.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
