"""Several frozen LoRAs, the experts, mixed by a gate that depends on block and time; only the gate is trained.

``W_l(t) = W_l + sum_k g_k(t) B_k A_k`` with ``g(t) = softmax(W e(t) + b)`` of the layer's block, after the gate of
FantasyTalking2 (arXiv 2508.11255). That paper does not publish the gate's formula: the softmax, the features ``e(t)``
and one gate per block are our reconstruction. A LoRA file cannot express such a policy, so it has its own file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from align.data.files import writing
from align.maths.gates import gate
from align.policy.added import Added, added, added_parameters, block_of
from align.policy.layers import Lora, LoraError, linear_layers
from align.policy.lora_layouts import read_lora
from align.policy.shards import whole
from alignflow.files import lora_files, tensor_files
from alignflow.files.lora_files import LoraFileError
from alignflow.files.policies import GATED as FILE
from alignflow.files.tensor_files import TensorFileError
from generators.base import Generator

NAME = "experts_gate"
ABOUT = "gated_loras"

Change = tuple[Tensor, Tensor]
"""One expert's change of one layer: A ``[r, in]`` and B ``[out, r]``."""


class Gate(Added):
    """The gate of one block, and the experts' changes of its layers.

    Args:
        generator: its call in progress holds the time of every row.
        names: of the K experts.
        changes: layer -> one change per expert, None for an expert that leaves the layer alone.
        features: of the time, even.
    """

    def __init__(
        self, generator: Generator, names: Sequence[str], changes: Mapping[str, Sequence[Change | None]], features: int
    ) -> None:
        super().__init__()
        self.generator, self.names, self.layers = generator, list(names), list(changes)
        self.weight = nn.Parameter(torch.zeros(len(names), features))
        self.bias = nn.Parameter(torch.zeros(len(names)))
        self.hooks: list[RemovableHandle] = []
        for number, layer in enumerate(changes):
            known = [(k, pair) for k, pair in enumerate(changes[layer]) if pair is not None]
            expert = torch.cat([torch.full((len(a),), k) for k, (a, _) in known])
            for name, value in (
                ("a", torch.cat([a for _, (a, _) in known])),
                ("b", torch.cat([b for _, (_, b) in known], 1)),
                ("expert", expert),
            ):
                self.register_buffer(f"{name}{number}", value)

    def shares(self, t: Tensor) -> Tensor:
        """Shares ``[N, K]`` of the experts at times ``[N]``."""
        return gate(t, self.weight, self.bias)

    def change(self, number: int, x: Tensor) -> Tensor | float:
        """Sum of the experts' contributions to the output of layer ``number`` on its input ``[N, ..., in]``."""
        if not self.on:
            return 0.0
        a, b, expert = (self.get_buffer(f"{name}{number}") for name in ("a", "b", "expert"))
        call = self.generator.call
        if call is None or len(x) != len(call.t):
            raise LoraError(
                f"layer {self.layers[number]} has {len(x)} rows, another number than the call: it cannot have a gate"
            )
        share = self.shares(call.t)[:, expert].reshape(len(x), *[1] * (x.ndim - 2), -1)
        return ((x.to(a.dtype) @ a.T) * share) @ b.T


def add_gates(generator: Generator, experts: Mapping[str, Lora], features: int) -> None:
    """Put experts onto the layers that any of them changes, with gates of equal shares.

    Args:
        experts: name -> its LoRA, with alpha / rank in B.

    Raises:
        LoraError: the model has two networks that share the time.
    """
    backbones = generator.backbones()
    if len(backbones) > 1:
        raise LoraError(f"experts with a gate need one network, and this model has {' and '.join(backbones)}")
    network, device = generator.backbone, generator.device
    network.requires_grad_(False)
    changed = {layer for lora in experts.values() for layer in lora}
    places: dict[str, list[str]] = {}
    for layer, _ in network.named_modules():
        if layer in changed:
            places.setdefault(block_of(layer), []).append(layer)
    for block, layers in places.items():
        changes = {layer: [lora.get(layer) for lora in experts.values()] for layer in layers}
        one = Gate(generator, list(experts), changes, features).to(device)
        network.get_submodule(block).add_module(NAME, one)
        one.hooks = [
            network.get_submodule(layer).register_forward_hook(_adding(one, number))
            for number, layer in enumerate(layers)
        ]


def take_off(generator: Generator) -> None:
    """Remove gates and experts."""
    for block, one in gates(generator).items():
        for hook in one.hooks:
            hook.remove()
        delattr(generator.backbone.get_submodule(block), NAME)


def _adding(one: Gate, number: int) -> Any:
    def hook(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        change = one.change(number, given[0])
        return out if isinstance(change, float) else out + change.to(out.dtype)

    return hook


def read_experts(generator: Generator, files: Mapping[str, str | os.PathLike[str]]) -> dict[str, Lora]:
    """Name -> LoRA of every expert's file or folder, or run folder.

    Raises:
        LoraError: one is not there, is damaged, was made for another model, or changes text encoders.
    """
    found = {}
    for name, given in files.items():
        place = Path(given).expanduser()
        try:
            file = lora_files.find(place / "lora" if (place / "lora").is_dir() else place)
            if text := sorted(lora_files.encoders(file) - {""}):
                raise LoraError(
                    f"expert {name}: {file} changes {' and '.join(text)}; an expert may change only the network"
                )
        except LoraFileError as error:
            raise LoraError(f"expert {name}: {error}") from None
        found[name] = read_lora(file, generator.backbone)
    return found


def gates(generator: Generator) -> dict[str, Gate]:
    """Name of the block -> its gate."""
    found = added(generator).items()
    return {name.removesuffix(NAME).rstrip("."): one for name, one in found if isinstance(one, Gate)}


def names(generator: Generator) -> list[str]:
    """Names of the experts."""
    return next(iter(gates(generator).values())).names


def shares(generator: Generator, t: Tensor) -> Tensor:
    """Shares ``[L, N, K]`` of the experts in every block at times ``[N]``, without gradient.

    Where weights are sharded every process must call it.
    """
    with torch.no_grad():
        return torch.stack([gate(t, whole(one.weight), whole(one.bias)) for one in gates(generator).values()])


def gated_tensors(generator: Generator) -> dict[str, Tensor]:
    """Gates and experts as the file holds them, on the CPU. Where weights are sharded every process must call it."""
    found: dict[str, Tensor] = {}
    for block, one in gates(generator).items():
        for key in ("weight", "bias"):
            found[f"gate.{block}.{key}"] = whole(getattr(one, key)).float().cpu()
        for number, layer in enumerate(one.layers):
            a, b, expert = (one.get_buffer(f"{part}{number}").cpu() for part in ("a", "b", "expert"))
            for k in expert.unique().tolist():
                found[f"expert.{k}.{layer}.lora_A.weight"] = a[expert == k].contiguous()
                found[f"expert.{k}.{layer}.lora_B.weight"] = b[:, expert == k].contiguous()
    return found


def save_gated(folder: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Path:
    """Write :func:`gated_tensors` into a folder, which :func:`load_gated` reads; whole or not at all."""
    path = folder / FILE
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tensor_files.save(path, dict(tensors), {"format": "pt", ABOUT: json.dumps({"experts": list(names)})})
    return path


def load_gated(generator: Generator, file: Path) -> None:
    """Put the experts and gates of a file onto a generator; nothing is trained then.

    Raises:
        LoraError: the file is damaged, or was made for another model.
    """
    tensors, names = _read(file)
    layers = linear_layers(generator.backbone)
    experts: dict[str, Lora] = {name: {} for name in names}
    for key in (key for key in tensors if key.endswith(".lora_A.weight")):
        k, layer = key.removeprefix("expert.").removesuffix(".lora_A.weight").split(".", 1)
        a, b = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
        if layers.get(layer) != (len(b), a.shape[1]):
            model = type(generator.backbone).__name__
            raise LoraError(f"{file} was not made for this {model}: it has no layer {layer} of this shape")
        experts[names[int(k)]][layer] = (a, b)
    features = next(value.shape[1] for key, value in tensors.items() if key.startswith("gate.") and value.ndim == 2)
    add_gates(generator, experts, features)
    for block, one in gates(generator).items():
        one.weight.data.copy_(tensors[f"gate.{block}.weight"])
        one.bias.data.copy_(tensors[f"gate.{block}.bias"])
    for _, value in added_parameters(generator):
        value.requires_grad_(False)


def _read(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a file, and the names of its experts."""
    try:
        _, about = tensor_files.header(file)
        return load_file(file), json.loads(about[ABOUT])["experts"]
    except (TensorFileError, SafetensorError, OSError, KeyError, ValueError) as error:
        raise LoraError(f"{file} is not a file of experts with a gate: {error}; copy it again") from None


def averaged(generator: Generator, count: int = 50) -> Lora:
    """One LoRA with the experts' shares averaged over ``count`` equal times in [0, 1]: the rank is the sum of theirs.

    What a plain LoRA can keep of a gate: it equals the policy where the shares do not depend on time.
    """
    times = (torch.arange(count, device=generator.device) + 0.5) / count
    found: Lora = {}
    for one in gates(generator).values():
        share = one.shares(times).detach().mean(0).cpu()
        for number, layer in enumerate(one.layers):
            a, b, expert = (one.get_buffer(f"{part}{number}").cpu() for part in ("a", "b", "expert"))
            found[layer] = (a.contiguous(), b * share[expert])
    return found
