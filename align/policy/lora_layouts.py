"""Other programs' LoRA files converted to diffusers' layers where it is exact: the inverse of :mod:`align.export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from align.policy import layouts
from align.policy.layers import CLIP, Lora, LoraError, linear_layers
from alignflow.files import lora_files
from alignflow.files.lora_encoders import PUBLISHED
from alignflow.files.lora_files import LoraFileError
from alignflow.files.weights import first
from alignflow.text import printable

_FLAT_TEXT, _TEXT = zip(*PUBLISHED.values(), strict=True)
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", *_TEXT)
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_", *_FLAT_TEXT)


@dataclass(frozen=True)
class Part:
    """One of diffusers' layers within a layer of a file: its rows there, of how many."""

    name: str
    start: int
    stop: int
    rows: int


def read_lora(file: Path, network: nn.Module, encoder: str = "") -> Lora:
    """The LoRA in ``file`` by the names of ``network``'s layers, with alpha / rank in B, float32 on the CPU.

    Args:
        encoder: component name of the text encoder that ``network`` is; "" for another network. Empty where the file
            does not change it.

    Read are diffusers', peft's, kohya's and ComfyUI's layouts. A fused layer (query, key and value in one) is divided
    along its outputs, which is exact; rows of zeros and the ranks that belong to them are left out.

    Raises:
        LoraError: damaged, not a plain LoRA, or made for another model; names layout and pairs.
    """
    try:
        found = lora_files.inspect(file).of(encoder)
        if not found.pairs:
            return {}
        layers = linear_layers(network)
        places = {stem: _parts(stem.removeprefix(f"{encoder}."), layers, network) for stem in found.pairs}
        _check(file, found, places, layers, network)
        tensors = lora_files.tensors(found)
    except LoraFileError as error:
        raise LoraError(str(error)) from None
    lora: Lora = {}
    for stem, parts in places.items():
        a, b = tensors[stem]
        for part in parts:
            pair = (a, b) if len(parts) == 1 else _trimmed(a, b[part.start : part.stop])
            if part.name in lora:
                raise LoraError(f"{file} changes {part.name} twice, the second time as {printable(stem)}")
            if pair is not None:
                lora[part.name] = pair
    if not lora:
        raise LoraError(f"{file} changes nothing: every B is zero")
    return lora


def _trimmed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """The ranks of a fused pair that reach these outputs; None if none does."""
    used = b.ne(0).any(0)
    return (a[used].contiguous(), b[:, used].contiguous()) if bool(used.any()) else None


def _parts(stem: str, layers: Mapping[str, tuple[int, int]], network: nn.Module) -> list[Part]:
    """Layers of the network that a name in the file means; empty if none."""
    name, flat = stem, False
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for prefix in FLAT:
        flat, name = (True, name.removeprefix(prefix)) if name.startswith(prefix) else (flat, name)
    if not flat and (own := next((one for one in (name, name.removeprefix(CLIP)) if one in layers), None)):
        return [Part(own, 0, layers[own][0], layers[own][0])]
    known = _published(layers, type(network).__name__)
    if flat:
        alike = [mine for mine in layers if mine.replace(".", "_") in (name, name.removeprefix(CLIP.replace(".", "_")))]
        if alike:
            return [Part(alike[0], 0, layers[alike[0]][0], layers[alike[0]][0])] if len(alike) == 1 else []
        known = {theirs.replace(".", "_"): parts for theirs, parts in known.items()}
    return known.get(name, [])


def _published(layers: Mapping[str, tuple[int, int]], network: str) -> dict[str, list[Part]]:
    """Published layer -> its parts, for every layer in the layout of this network class."""
    layout = layouts.LAYOUTS.get(network)
    if layout is None:
        return {}
    fused = dict(found for name in layers if (found := layouts.place(name, layout)))
    parts = {}
    for theirs, ours in fused.items():
        if all(name in layers for name in ours):
            ends = [sum(layers[name][0] for name in ours[:count]) for count in range(len(ours) + 1)]
            parts[theirs] = [
                Part(name, start, stop, ends[-1]) for name, start, stop in zip(ours, ends, ends[1:], strict=False)
            ]
    return parts


def _check(
    file: Path,
    found: lora_files.LoraFile,
    places: Mapping[str, list[Part]],
    layers: Mapping[str, tuple[int, int]],
    network: nn.Module,
) -> None:
    """Raise LoraError unless every pair has layers of its shape to go to."""
    model = type(network).__name__
    unknown = [stem for stem, parts in places.items() if not parts]
    shapes = []
    for stem, parts in places.items():
        a, b = (found.shapes[key] for key in (found.pairs[stem].a, found.pairs[stem].b))
        if parts and (a[1] != layers[parts[0].name][1] or b[0] != parts[0].rows):
            takes = f"{layers[parts[0].name][1]} inputs and {parts[0].rows} outputs"
            shapes.append(f"{printable(stem)} has {a[1]} and {b[0]}, the layer {takes}")
    if not unknown and not shapes:
        return
    wrong = len(unknown) + len(shapes)
    said = [f"first {printable(first(unknown))}"] if unknown else []
    raise LoraError(
        f"{file}, a LoRA in the {found.layout} layout, was not made for this {model}: {wrong} of {len(places)} "
        f"pairs do not fit, {'; '.join([*said, *shapes[:2]])}"
    )
