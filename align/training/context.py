"""Context parallelism: the processes of a group compute every sample together, each a part of its tokens.

Which tensors of a network are divided and gathered again is diffusers' plan for its class; attention exchanges heads
for tokens and back (Ulysses, arXiv 2309.14509). Outside the network all processes of a group hold the same.

Gradients. The network takes the same inputs in each process of a group and gives the same output in each, and each
takes the same loss L of it. Of dL/d(output), gathering hands back to a process the rows of its own tokens, and
attention brings it what the tokens of the others contribute, so it holds the exact dL/d(token) of its own tokens. A
weight w works on every token: dL/dw is the sum of the processes' parts, without division, as the sum over samples is.
An input x is used by every process for its own tokens: dL/dx is the sum too, taken where x enters (:class:`Entering`).
So what stands before the network, such as an earlier step of the sampler or a text encoder, has the whole gradient in
each process of the group; it is counted once (:meth:`~align.runs.processes.Processes.add_gradients`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from align.checking import context_check
from alignflow.errors import ConfigError
from generators.base import Generator, GeneratorError
from generators.memory import processors

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.runs.processes import Processes


class Entering(torch.autograd.Function):
    """An input of a divided network: unchanged; its gradient is summed over the processes of the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=ctx.group)
        return total, None


def divide(config: Config, generator: Generator, processes: Processes) -> None:
    """Divide the tokens of the trained networks among the processes of each group; nothing where a group is one.

    diffusers' ``enable_parallelism`` does the same on accelerators alone; these are its steps.

    Raises:
        ConfigError: tokens or heads cannot be divided evenly.
        GeneratorError: diffusers has no plan for the network, or its attention cannot reach other processes.
    """
    if processes.context == 1:
        return
    if found := context_check.problems(config):  # of a model that was not known before its download
        raise ConfigError(found, config.name)
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    device, ways = processes.accelerator.device, processes.context
    shape, names = (processes.share.world, 1, ways), ("data", "ring", "ulysses")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)["ring", "ulysses"]
    processes.group = mesh["ulysses"].get_group()
    how = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=ways, mesh=mesh))
    how.setup(processes.rank, processes.world, device, mesh=mesh)
    for network in generator.backbones().values():
        _check(network)
        for one in processors(network):
            one._parallel_config = how
        apply_context_parallel(network, how.context_parallel_config, network._cp_plan)  # type: ignore[arg-type]
        network.register_forward_pre_hook(partial(_enter, processes.group), with_kwargs=True)
    networks = generator.backbones().values()
    processes.divided = frozenset(id(value) for network in networks for value in network.parameters())


def _check(network: nn.Module) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    name = type(network).__name__
    if getattr(network, "_cp_plan", None) is None:
        raise GeneratorError(f"parallel.context: diffusers has no plan to divide the tokens of {name}; use 1")
    deaf = {type(one).__name__ for one in processors(network) if not hasattr(one, "_parallel_config")}
    if deaf:
        raise GeneratorError(
            f"parallel.context: {', '.join(sorted(deaf))} of {name} computes attention by itself; use 1"
        )
    active, _ = _AttentionBackendRegistry.get_active_backend()
    for one in processors(network):
        backend = AttentionBackendName(one._attention_backend or active)
        if not _AttentionBackendRegistry._is_context_parallel_available(backend):
            raise GeneratorError(f"parallel.context: attention {backend.value} of {name} stays in one process; use 1")


def _enter(
    group: distributed.ProcessGroup, network: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs with a gradient enter a divided network through :class:`Entering`."""
    enter = lambda value: Entering.apply(value, group) if _has_gradient(value) else value  # noqa: E731
    return tuple(map(enter, args)), {name: enter(value) for name, value in given.items()}


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()
