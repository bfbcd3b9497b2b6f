"""Verification of an export: loaded by diffusers in an unmodified pipeline and compared with the trained policy."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from safetensors.torch import load_file
from torch import Tensor, nn

from align.export.layouts import ExportError, Layout, published
from align.policy.lora import Lora, linear_layers, lora_of, loras_of
from align.policy.switching import PARTS
from alignflow.text import first_line
from generators.base import Generator

TIMES = (0.95, 0.5, 0.05)  # flow times at which velocities are compared; experts by time are all asked
ADAPTER = "exported"
PROMPT = "a red circle beside two blue squares"
EXACT, ROUNDED = 1e-4, 3e-2  # tolerances in float32, and with half precision


@dataclass(frozen=True)
class Answers:
    """Velocities ``[T, ...]`` at fixed noise and times, and the media they end in, on the CPU."""

    velocities: Tensor
    media: Tensor

    def moved(self, base: Answers) -> float:
        """Largest absolute difference of the velocities."""
        return float((self.velocities - base.velocities).abs().max())

    def difference(self, policy: Answers) -> float:
        """Largest absolute difference of anything."""
        return max(self.moved(policy), float((self.media - policy.media).abs().max()))


def answers(generator: Generator, *, decode: bool) -> Answers:
    """Velocities of ``generator`` at :data:`TIMES`; images that it needs are random."""
    source = torch.Generator().manual_seed(0)
    shapes = {name: (1, 1 if name == "mask" else 3, *generator.size) for name in generator.inputs}
    inputs = {name: torch.rand(shape, generator=source) for name, shape in shapes.items()}
    with torch.no_grad():
        cond, x = generator.encode([_prompt(generator)], inputs), generator.noise([0])
        velocities = [generator.velocity(x, torch.tensor(t), cond) for t in TIMES]
        media = generator.decode(x - velocities[0]) if decode else torch.zeros(1)
    return Answers(torch.cat(velocities).cpu(), media.float().cpu())


def _prompt(generator: Generator) -> str:
    """As many words of :data:`PROMPT` as the model reads."""
    words = PROMPT.split()
    while len(words) > 1 and generator.too_long([" ".join(words)]):
        words.pop()
    return " ".join(words)


def trained_loras(generator: Generator) -> dict[str, Lora]:
    """Component -> its LoRA, of the networks and text encoders that have one.

    Raises:
        ExportError: there is none, or of some of the networks alone, or it holds NaN.
    """
    loras, backbones = loras_of(generator), generator.backbones()
    without = [type(network).__name__ for name, network in backbones.items() if name not in loras]
    if without and (not loras or len(without) < len(backbones)):
        raise ExportError(f"no LoRA was read into {without[0]}")
    for lora in loras.values():
        broken = [name for name, pair in lora.items() if not all(value.isfinite().all() for value in pair)]
        if broken:
            raise ExportError(
                f"the LoRA holds NaN or infinity in {len(broken)} layers, first {broken[0]}; try another step"
            )
    return loras


def merge(generator: Generator) -> None:
    """Add the LoRA of every network to its weights, in float32, and take the LoRA off."""
    networks = generator.part_networks(PARTS)
    for component, lora in trained_loras(generator).items():
        network: Any = networks[component]
        if not hasattr(network, "unload_lora"):  # a model of transformers
            network.delete_adapter(list(network.peft_config))
            recurse_remove_peft_layers(network)
        else:
            network.unload_lora()
        for name, (a, b) in lora.items():
            weight = network.get_submodule(name).weight
            change = b.to(weight.device) @ a.to(weight.device)
            weight.data = (weight.data.float() + change).to(weight.dtype)


def fingerprint(network: nn.Module) -> str:
    """Digest of every tensor of a network, dtype and name included."""
    digest = hashlib.blake2b()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_lora(generator: Generator, files: Mapping[str, Path], policy: Mapping[str, Lora], tolerance: float) -> None:
    """diffusers' own ``load_lora_weights`` into a fresh generator; every layer's change must be the policy's.

    Raises:
        ExportError: it does not read them, or reads something else.
    """
    networks, read = generator.part_networks(PARTS), set()
    for component, lora in policy.items():
        path, network = files[component], networks[component]
        second = {f"load_into_{component}": True} if component.startswith("transformer_") else {}
        reader: Any = getattr(generator.pipeline, "load_lora_weights", None) or network.load_lora_adapter
        if path not in read:
            with _explained(path):
                reader(str(path.parent), weight_name=path.name, adapter_name=ADAPTER, **second)
        read.add(path)
        changes = ((name, b @ a) for name, (a, b) in lora_of(network).items())
        _same(path, changes, lora, tolerance)


def read_weights(
    generator: Generator, files: Mapping[str, Path], layout: Layout, policy: Mapping[str, Lora], tolerance: float
) -> None:
    """The changes of LoRA files, read as published checkpoints by diffusers' converter and added to the weights.

    Raises:
        ExportError: as :func:`read_lora`.
    """
    for component, network in generator.backbones().items():
        path, weights = files[component], dict(network.named_parameters())
        rows = {name: shape[0] for name, shape in linear_layers(network).items()}
        checkpoint = Changes(_file_changes(path, list(published(policy[component], rows, layout))))
        for blocks in layout.blocks:  # the converter counts blocks, also those that were not trained
            depth = len([name for name, _ in network.named_modules() if re.fullmatch(rf"{blocks.ours}\.\d+", name)])
            checkpoint[f"{blocks.theirs}.{depth - 1}.end"] = torch.zeros(6)
        with _explained(path):
            read = getattr(single_file_utils, str(layout.converter))(checkpoint)
        fitting = {key: value for key, value in read.items() if key in weights and value.shape == weights[key].shape}
        changes = ((key.removesuffix(".weight"), value) for key, value in fitting.items() if key.endswith(".weight"))
        _same(path, changes, policy[component], tolerance)
        for key, change in fitting.items():
            value = weights[key]
            value.data = (value.data.float() + change.to(value.device)).to(value.dtype)


class Changes(dict[str, Tensor]):
    """Changes of a checkpoint's weights: zero for every weight that it does not hold."""

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(6)  # can be split in two and in three

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key) if key in self else self[key]


def _file_changes(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Published weight and its change, of every layer in a ``comfyui`` or ``kohya`` file."""
    tensors, flat = load_file(path), {f"lora_unet_{name.replace('.', '_')}": name for name in names}
    for key, up in tensors.items():
        stem, _, part = key.removesuffix(".weight").rpartition(".")
        if part in ("lora_up", "lora_B"):
            down = tensors[f"{stem}.{'lora_down' if part == 'lora_up' else 'lora_A'}.weight"].float()
            scale = float(tensors.get(f"{stem}.alpha", torch.tensor(len(down)))) / len(down)
            yield f"{flat.get(stem, stem.removeprefix('diffusion_model.'))}.weight", scale * up.float() @ down


def _same(path: Path, changes: Iterable[tuple[str, Tensor]], lora: Lora, tolerance: float) -> None:
    """Raise ExportError unless the changes of weights are those of ``lora``, at the scale of each layer's own."""
    wrong, missing = [], {name for name, (_, b) in lora.items() if b.any()}
    for name, change in changes:
        a, b = lora.get(name, (torch.zeros(1, 1), torch.zeros(1, 1)))
        wanted = b @ a
        if float((change.cpu().float() - wanted).abs().max()) > tolerance * float(wanted.abs().max()):
            wrong.append(name)
        missing.discard(name)
    if wrong or missing:
        first = min([*wrong, *missing])
        raise ExportError(
            f"{path.name} reads back as another LoRA: {len(missing)} layers are not read, {len(wrong)} differ, first "
            f"{first}; nothing was kept"
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the failures of a reader into ExportErrors."""
    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        AssertionError,
    ) as error:
        raise ExportError(
            f"diffusers does not read {path.name}: {type(error).__name__}: {first_line(error)}; nothing was kept"
        ) from error
