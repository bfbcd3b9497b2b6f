"""Placement and storage of a pipeline's weights, by the methods of diffusers and accelerate.

The trained network stays on its device, but for its swapped blocks (:mod:`generators.swap`): its weights are needed
again at backward. What may wait on the CPU are the text encoders, which are read once a rollout. A recipe that trains
them keeps them beside the network. The VAE stays as well: it is small, and recipes that climb a reward's gradient go
backward through it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor, nn

from alignflow import hub
from alignflow.extras import remedy
from alignflow.text import first_line
from generators.errors import GeneratorError
from generators.settings import Memory
from generators.swap import Swap
from generators.text_cache import text_encoders

BACKENDS = {
    "native": "native",
    "xformers": "xformers",
    "flash": "flash",
    "flash3": "_flash_3",
    "sage": "sage",
    "flash_hub": "flash_hub",
    "flash3_hub": "_flash_3_hub",
    "flash4_hub": "flash_4_hub",
    "sage_hub": "sage_hub",
}
"""Our name of an attention backend -> diffusers'."""

MASKLESS = ("flash", "_flash_3", "sage", "flash_hub", "_flash_3_hub", "flash_4_hub", "sage_hub")
"""diffusers' backends that can neither weigh nor hide keys."""


# -- before and while a pipeline is loaded ----------------------------------------------------------------------------


def quantisation(kind: str, components: Iterable[str], dtype: torch.dtype) -> PipelineQuantizationConfig | None:
    """Arguments of ``from_pretrained`` that store ``components`` as ``kind``; None for ``none``.

    Args:
        dtype: what stored weights are turned into for each product.

    Raises:
        GeneratorError: the library is not installed.
    """
    if kind == "none":
        return None
    try:
        if kind == "nf4":
            config: Any = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        elif kind == "int8":
            config = BitsAndBytesConfig(load_in_8bit=True)
        else:
            from torchao.quantization import Float8WeightOnlyConfig

            config = TorchAoConfig(Float8WeightOnlyConfig())
    except ImportError as error:
        package = "torchao" if kind == "fp8" else "bitsandbytes"
        raise GeneratorError(f"memory.quantise {kind}: {error}; {remedy(package)}") from error
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(components, config))


def place(pipeline: Any, device: torch.device | str, memory: Memory, trained: Collection[str] = ()) -> list[Any]:
    """Move a pipeline's networks to ``device``, the text encoders only as ``memory.offload`` says.

    Args:
        trained: names of the networks of which ``memory.swap_blocks`` blocks stay on the CPU.

    Returns:
        accelerate's hooks of encoders that stay where they were used until ``hook.offload()``.
    """
    device = torch.device(device)
    waiting = text_encoders(pipeline) if memory.offload != "none" else {}
    for name, part in pipeline.components.items():
        if memory.swap_blocks and name in trained:
            Swap(part, memory.swap_blocks, device)
        elif isinstance(part, nn.Module) and name not in waiting and not is_placed(part):
            part.to(device)
    if memory.offload == "group":
        for part in waiting.values():
            apply_group_offloading(part, onload_device=device, offload_type="leaf_level")
        return []
    from accelerate import cpu_offload_with_hook

    return [cpu_offload_with_hook(part, device)[1] for part in waiting.values()]


def is_placed(part: nn.Module) -> bool:
    """Whether bitsandbytes put a network on the device when it was loaded."""
    return bool(getattr(part, "is_loaded_in_4bit", False) or getattr(part, "is_loaded_in_8bit", False))


# -- after it is loaded -----------------------------------------------------------------------------------------------


def thrifty_vae(vae: Any, memory: Memory) -> None:
    """Tiling and slicing as asked; raises GeneratorError if this VAE supports none."""
    for name, wanted in (("tiling", memory.vae_tiling), ("slicing", memory.vae_slicing)):
        if wanted:
            try:
                getattr(vae, f"enable_{name}")()
            except (AttributeError, NotImplementedError):
                known = f"memory.vae_{name}: {type(vae).__name__} has no {name}"
                raise GeneratorError(f"{known}; set memory.vae_{name}=false, or lower rollout.decode_chunk") from None


def set_attention(networks: Iterable[Any], name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Let every attention of ``networks`` go through the backend ``name``, and through no other network's.

    diffusers' ``set_attention_backend`` passes over processors that compute attention themselves, and makes its choice
    the default of every network of the process. Here the first is an error and the second is undone.

    Raises:
        GeneratorError: not installed, not for this device or dtype, wrong, or it would have been ignored.
    """
    if name == "auto":
        return
    _try_backend(name, dtype, device)
    for network in networks:
        deaf = {type(part).__name__ for part in processors(network) if not hasattr(part, "_attention_backend")}
        if deaf:
            raise GeneratorError(
                f"memory.attention {name}: {', '.join(sorted(deaf))} of {type(network).__name__} computes attention "
                "itself and would ignore it; use auto"
            )
        with attention_backend(AttentionBackendName.NATIVE):  # puts back the default of the process when it is left
            network.set_attention_backend(BACKENDS[name])


def processors(network: nn.Module) -> list[Any]:
    """The attention processors of a network."""
    found = (getattr(module, "processor", None) for module in network.modules())
    return [part for part in found if part is not None]


def _try_backend(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """One small attention with its gradient, compared to torch's own."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 2, 64, generator=source).to(device, dtype) for _ in range(3))
    silent = hub.silent() if name.endswith("_hub") else ""
    found_here = hub.offline() if silent else nullcontext()  # kernels in the cache are found without a network too
    try:
        expected = attend(q, k, v, "native")
        trains = not name.startswith("sage")
        with found_here, torch.enable_grad(), attention_backend(AttentionBackendName(BACKENDS[name])):  # downloads
            found = attend(q.requires_grad_(trains), k, v, name)
            if q.requires_grad:
                found.float().sum().backward()
    except Exception as error:  # each package fails in its own way: missing, no kernel for this card, another dtype
        said = first_line(error) + (f" (the hub cannot be reached: {silent})" if silent else "")
        raise GeneratorError(f"memory.attention {name} does not work here: {said}; use native") from error
    gap = float((found.detach() - expected).abs().max())
    if not gap < 0.1 or (q.requires_grad and q.grad is None):
        raise GeneratorError(f"memory.attention {name} is wrong here by {gap:.2g} or has no gradient; use native")


def attend(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    """Attention ``[N, L, heads, width]`` through the backend ``name``."""
    return dispatch_attention_fn(q, k, v, backend=AttentionBackendName(BACKENDS[name]))
