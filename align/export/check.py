"""Verification of an export: loaded by diffusers in an unmodified pipeline and compared with the trained policy."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from safetensors.torch import load_file
from torch import Tensor, nn

from align.policy.layers import CLIP, Lora, linear_layers
from align.policy.layouts import ExportError, Layout, published
from align.policy.lora import lora_of, loras_of
from align.policy.switching import PARTS
from alignflow.files.lora_encoders import PUBLISHED
from alignflow.text import first_line
from generators.base import Generator

TIMES = (0.95, 0.5, 0.05)  # flow times at which velocities are compared; experts by time are all asked
ADAPTER = "exported"
TEXT = tuple(start for starts in PUBLISHED.values() for start in starts)
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

    Args:
        policy: component -> LoRA. Text encoders by their published names are left to :func:`read_encoders`.

    Raises:
        ExportError: it does not read them, or reads something else.
    """
    networks, read = generator.part_networks(PARTS), set()
    for component, lora in policy.items():
        path, network = files[component], networks[component]
        second = {f"load_into_{component}": True} if component.startswith("transformer_") else {}
        reader: Any = getattr(generator.pipeline, "load_lora_weights", None) or network.load_lora_adapter
        if path not in read:
            tensors = load_file(path)
            own = {key: value for key, value in tensors.items() if not key.startswith(TEXT)}
            given, named = (own, {}) if len(own) < len(tensors) else (str(path.parent), {"weight_name": path.name})
            with _explained(path):
                reader(given, adapter_name=ADAPTER, **named, **second)
        read.add(path)
        changes = ((name, b @ a) for name, (a, b) in lora_of(network).items())
        _same(path, changes, lora, tolerance)


def read_weights(
    generator: Generator, files: Mapping[str, Path], layout: Layout, policy: Mapping[str, Lora], tolerance: float
) -> None:
    """The changes of networks in LoRA files, read as published checkpoints by diffusers' converter and added.

    Raises:
        ExportError: as :func:`read_lora`.
    """
    for component, lora in policy.items():
        network = generator.backbones()[component]
        _add(files[component], network, _network_changes(files[component], network, layout, lora), lora, tolerance)


def read_encoders(
    generator: Generator, files: Mapping[str, Path], policy: Mapping[str, Lora], tolerance: float
) -> None:
    """The same of text encoders, read as those in a checkpoint of the whole pipeline.

    diffusers' LoRA reader of FLUX leaves out text encoders whose output layers have no LoRA, and SD3 has no reader.

    Raises:
        ExportError: as :func:`read_lora`.
    """
    for component, lora in policy.items():
        network = generator.part_networks(("text",))[component]
        _add(files[component], network, _encoder_changes(files[component], component, network), lora, tolerance)
    generator.text_changed()


def _add(path: Path, network: nn.Module, read: Mapping[str, Tensor], lora: Lora, tolerance: float) -> None:
    """Add changes of weights, by name, after a comparison with those of ``lora``; others are left out."""
    weights = dict(network.named_parameters())
    fitting = {key: value for key, value in read.items() if key in weights and value.shape == weights[key].shape}
    changes = ((key.removesuffix(".weight"), value) for key, value in fitting.items() if key.endswith(".weight"))
    _same(path, changes, lora, tolerance)
    for key, change in fitting.items():
        value = weights[key]
        value.data = (value.data.float() + change.to(value.device)).to(value.dtype)


def _network_changes(path: Path, network: nn.Module, layout: Layout, lora: Lora) -> dict[str, Tensor]:
    """Weight of a network -> its change, as diffusers' converter gives it."""
    rows = {name: shape[0] for name, shape in linear_layers(network).items()}
    flat = {f"lora_unet_{name.replace('.', '_')}": name for name in published(lora, rows, layout)}
    checkpoint = Changes(_file_changes(path, flat, "diffusion_model."))
    for blocks in layout.blocks:  # the converter counts blocks, also those that were not trained
        depth = len([name for name, _ in network.named_modules() if re.fullmatch(rf"{blocks.ours}\.\d+", name)])
        checkpoint[f"{blocks.theirs}.{depth - 1}.end"] = torch.zeros(6)
    with _explained(path):
        return dict(getattr(single_file_utils, str(layout.converter))(checkpoint))


def _encoder_changes(path: Path, component: str, network: nn.Module) -> dict[str, Tensor]:
    """Weight of a text encoder -> its change, as diffusers reads CLIP from a checkpoint of the whole pipeline."""
    start, dotted = PUBLISHED[component]
    names = [CLIP + name.removeprefix(CLIP) for name in linear_layers(network)]
    flat = {start + name.replace(".", "_"): name for name in names}
    checkpoint = {dotted + key: value for key, value in _file_changes(path, flat, dotted)}
    with _explained(path):
        read = single_file_utils.convert_ldm_clip_checkpoint(checkpoint, dotted)
    own = {key.removeprefix(CLIP): key for key, _ in network.named_parameters()}  # transformers' versions differ
    return {own.get(key.removeprefix(CLIP), key): value for key, value in read.items()}


class Changes(dict[str, Tensor]):
    """Changes of a checkpoint's weights: zero for every weight that it does not hold."""

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(6)  # can be split in two and in three

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key) if key in self else self[key]


def _file_changes(path: Path, flat: Mapping[str, str], start: str) -> Iterator[tuple[str, Tensor]]:
    """Published weight and its change, of the layers in a ``comfyui`` or ``kohya`` file that belong to one network.

    Args:
        flat: name in a ``kohya`` file -> published layer.
        start: of the names in a ``comfyui`` file.
    """
    tensors = load_file(path)
    for key, up in tensors.items():
        stem, _, part = key.removesuffix(".weight").rpartition(".")
        if part in ("lora_up", "lora_B") and (stem in flat or stem.startswith(start)):
            down = tensors[f"{stem}.{'lora_down' if part == 'lora_up' else 'lora_A'}.weight"].float()
            scale = float(tensors.get(f"{stem}.alpha", torch.tensor(len(down)))) / len(down)
            yield f"{flat.get(stem, stem.removeprefix(start))}.weight", scale * up.float() @ down


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
        said = f"{type(error).__name__}: {first_line(error)}" if str(error) else _unsaid(error)
        raise ExportError(f"diffusers does not read {path.name}: {said}; nothing was kept") from error


def _unsaid(error: BaseException) -> str:
    """An error without a message, in words: where it was raised, what it may mean, and what to do."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"a check of {place.name} in its {Path(place.filename).name}, line {place.lineno}, failed without a message "
        f"({type(error).__name__}: {place.line}). It may only know the published model's sizes. Use --to diffusers"
    )
