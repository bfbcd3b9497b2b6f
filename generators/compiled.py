"""Compilation of the trained network, by blocks: sampling and learning run the same graph of every block.

torch.compile makes a graph for every state that it guards: whether gradients are on, and which inputs need one. A
rollout without gradient and an update would therefore run two graphs, whose kernels add up in different orders, and
log-probabilities would differ by more than a clipping range. Here a block always runs with gradients on, and its
streams of tokens always need one. Without gradient outside, the result of each block is detached, so that what one
block saves for backward is freed before the next one computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alignflow.lazy import lazy
from generators.errors import GeneratorError

if TYPE_CHECKING:
    import torch._dynamo as dynamo
else:
    dynamo = lazy("torch._dynamo")

GRAPHS = 64
"""Graphs of one block that torch may make: structures, times shapes, times the LoRAs that are on."""
STREAMS = ("hidden_states", "encoder_hidden_states", "x")
"""Arguments of diffusers' blocks that hold tokens: each block changes them, so all but the first one's need a gradient
in an update."""
CONDITIONING = ("temb", "temb_mod", "temb_mod_img", "temb_mod_txt", "timestep", "adaln_input")
"""Arguments that hold the time and the pooled text: they need a gradient where weights that make them are trained."""


def compile_networks(networks: Iterable[Any], how: str) -> None:
    """``torch.compile`` of ``none``, the repeated ``blocks``, or the ``full`` network, in place: names stay.

    Call it when the trained parameters are there: they decide which inputs of a block need a gradient.

    Raises:
        GeneratorError: the class does not name its repeated blocks.
    """
    if how != "none":  # past torch's limit of 8, blocks of another shape or structure would run as eager code
        dynamo.config.recompile_limit = max(GRAPHS, dynamo.config.recompile_limit)
    for network in networks if how != "none" else ():
        if how == "full":
            network.compile()
            continue
        if not network._repeated_blocks:  # some classes, SD3's among them, name them for another purpose alone
            network._repeated_blocks = list(network._no_split_modules or ())
        try:
            network.compile_repeated_blocks()
        except ValueError:
            known = f"memory.compile blocks: {type(network).__name__} names no repeated blocks"
            raise GeneratorError(f"{known}; use memory.compile: full or none") from None
        _one_graph(network)


def _one_graph(network: nn.Module) -> None:
    """Put :class:`OneGraph` around every compiled block."""
    blocks = [module for module in network.modules() if module._compiled_call_impl is not None]
    inside = {id(value) for block in blocks for value in block.parameters()}
    outside = any(value.requires_grad and id(value) not in inside for value in network.parameters())
    for block in blocks:
        names = (*STREAMS, *(CONDITIONING if outside else ()))
        block._compiled_call_impl = OneGraph(block._compiled_call_impl, block.forward, names)  # type: ignore[assignment]


class OneGraph:
    """A compiled block that runs one graph, whether the code around it computes gradients or not.

    Args:
        compiled: the block's call.
        forward: the block's method, for the names of its arguments.
        names: arguments that always need a gradient, where they are floating point tensors.
    """

    def __init__(self, compiled: Any, forward: Callable[..., Any], names: Iterable[str]) -> None:
        self.compiled, order = compiled, list(inspect.signature(forward).parameters)
        self.names = {name for name in names if name in order}
        self.places = {order.index(name) for name in self.names}

    def __call__(self, *given: Any, **named: Any) -> Any:
        """The block's result, without graph where gradients are off."""
        learning = torch.is_grad_enabled()
        args = [_ready(value, learning) if place in self.places else value for place, value in enumerate(given)]
        kwargs = {name: _ready(value, learning) if name in self.names else value for name, value in named.items()}
        with torch.enable_grad():
            found = self.compiled(*args, **kwargs)
        return found if learning else _detached(found)


def _ready(value: Any, learning: bool) -> Any:
    """A tensor as every call of a block has it: with a gradient, and with the strides of a contiguous one."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    kept = value if learning and value.requires_grad else value.detach().requires_grad_()
    with torch.enable_grad():
        return kept.contiguous()


def _detached(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found.detach()
    return type(found)(_detached(part) for part in found) if isinstance(found, tuple | list) else found
