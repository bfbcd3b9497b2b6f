"""LoRAs of a generator switched on and off: one alone, several, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from generators.base import Generator

PARTS = ("network", "text")


@contextmanager
def lora_only(generator: Generator, *names: str) -> Iterator[None]:
    """Inside the block backbone and text encoders compute with these LoRAs and no others; without names, as the base.

    No LoRA is changed, nor which parameters are trained. Gradient checkpointing computes again in the backward pass,
    which then belongs inside the block too.
    """
    networks = generator.part_networks(PARTS).values()
    layers = [module for network in networks for module in network.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer, layer.active_adapters, layer.disable_adapters) for layer in layers]
    # peft's switches also change which parameters are trained
    trained = [(value, value.requires_grad) for layer in layers for value in layer.parameters()]

    def restore() -> None:
        for value, wanted in trained:
            value.requires_grad_(wanted)

    for layer in layers:
        if names:
            layer.set_adapter(list(names))
        layer.enable_adapters(bool(names))
    restore()
    try:
        yield
    finally:
        for layer, active, off in before:
            layer.set_adapter(active)
            layer.enable_adapters(not off)
        restore()


def lora_off(generator: Generator) -> AbstractContextManager[None]:
    """Inside the block the generator computes as the base: :func:`lora_only` without names."""
    return lora_only(generator)


def drop_lora(generator: Generator, name: str) -> None:
    """Take one LoRA off the backbone; others stay."""
    for network in generator.backbones().values():
        adapters = getattr(network, "peft_config", {})
        if list(adapters) == [name]:
            network.unload_lora()  # type: ignore[operator]
        elif name in adapters:
            network.delete_adapters(name)  # type: ignore[operator]
            use_all(network)
            network.requires_grad_(False)


def use_all(network: Any) -> None:
    """Every LoRA on the network takes part: peft leaves on the last one alone."""
    names = list(getattr(network, "peft_config", {}))
    if names:
        network.set_adapter(names)
