"""A LoRA as pairs of matrices by layer, and the linear layers that can have one."""

from __future__ import annotations

from torch import Tensor, nn

from alignflow.errors import AlignflowError

PREFIX = "transformer."
CLIP = "text_model."
"""Before a layer's name in diffusers' files: of the network, and of a CLIP text encoder within its component."""

Lora = dict[str, tuple[Tensor, Tensor]]
"""Layer -> (A ``[r, in]``, B ``[out, r]``) of the change ``B A`` of its weight; B has the scale ``alpha / rank``."""


class LoraError(AlignflowError, ValueError):
    """A LoRA that does not fit the model; names the modules or keys."""

    exit_code = 2


def linear_layers(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> ``(out, in)`` of a network's linear layers; weights stored in fewer bits have another shape."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
