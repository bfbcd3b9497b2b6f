"""LoRA files of other programs, converted by diffusers: tensors that are left out are found, and refused or reported.

diffusers drops tensors that it does not know, some without a word. So the file is converted twice more with a number of
its own in every tensor and known values of alpha: a tensor whose number comes out was understood.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from align.policy.layers import LoraError
from alignflow.files import tensor_files
from alignflow.files.weights import first, is_finite
from alignflow.text import printable

_TEXT = re.compile(r"(lora_te|text_encoder|text_model|conditioner\.)")
_ALPHA = ".alpha"
_DOWN = (".lora_down.weight", ".lora_A.weight")
_BIAS = ".lora_B.bias"


@dataclass(frozen=True)
class Converted:
    """A file in diffusers' layout.

    Args:
        path: holds pairs alone.
        biases: layer -> change of its bias ``[out]``.
        notes: sentences on what was left out.
    """

    path: Path
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@contextmanager
def converted(pipeline: Any, file: Path, own: Exception) -> Iterator[Converted]:
    """The file as diffusers' converter for this pipeline gives it; it exists inside the block.

    Tensors of text encoders that the converter leaves out, and others that are zero, are named in ``notes``.

    Args:
        own: why our reader refuses the file; raised where diffusers does not convert it either.

    Raises:
        LoraError: a tensor that changes the network would be left out.
    """
    try:
        given = load_file(file)
    except (SafetensorError, OSError, ValueError):
        raise own from None
    found = _convert(pipeline, given)
    if found is None or set(found) == set(given):
        raise own
    ignored = sorted(set(given) - _understood(pipeline, given))
    lost = [key for key in ignored if not _TEXT.match(key) and bool(given[key].ne(0).any())]
    if lost:
        raise LoraError(
            f"{own}. diffusers' converter would leave out {len(lost)} of {len(given)} tensors, first "
            f"{printable(first(lost))}"
        )
    text = [key for key in ignored if _TEXT.match(key)]
    zeros = [key for key in ignored if key not in text]
    notes = [f"{len(text)} tensors of text encoders that cannot have a LoRA here, first {text[0]}"] if text else []
    notes += [f"{len(zeros)} tensors of zeros, first {zeros[0]}"] if zeros else []
    biases = {key.removesuffix(_BIAS): value.float() for key, value in found.items() if key.endswith(_BIAS)}
    pairs = {key: value for key, value in _by_peft(found).items() if not key.endswith(_BIAS)}
    if alone := [layer for layer in biases if f"{layer}.lora_A.weight" not in pairs]:
        raise LoraError(f"{file} changes the bias of {printable(alone[0])} and not its weight, which is not read")
    if broken := [layer for layer, value in biases.items() if not is_finite(value)]:
        raise LoraError(f"{file} holds NaN or infinity in {len(broken)} biases, first {printable(broken[0])}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.name
        tensor_files.save(path, {key: value.contiguous().clone() for key, value in pairs.items()}, {"format": "pt"})
        yield Converted(path, biases, tuple(f"{file}: left out {note}" for note in notes))


def say(notes: tuple[str, ...]) -> None:
    """Print what was left out."""
    for note in notes:
        print(note, file=sys.stderr)


def _convert(pipeline: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors by diffusers' names; None where diffusers has no converter or it fails."""
    read = getattr(type(pipeline), "lora_state_dict", None)
    if read is None:
        return None
    try:
        return dict(read({key: value.clone() for key, value in given.items()}))
    except Exception:  # converters index and assert as they go, so that a foreign file may raise anything
        return None


def _understood(pipeline: Any, given: Mapping[str, Tensor]) -> set[str]:
    """Keys of the tensors that reach the result of the conversion."""
    numbers = {key: 2.0 * place + 1 for place, key in enumerate(given) if not key.endswith(_ALPHA)}
    seen: list[set[float]] = []
    for factor in (1.0, 2.0):
        marked = {key: torch.full(given[key].shape, number, dtype=torch.float64) for key, number in numbers.items()}
        for key in given.keys() - numbers.keys():
            marked[key] = torch.tensor(factor * _rank(given, key.removesuffix(_ALPHA)), dtype=torch.float64)
        found = _convert(pipeline, marked) or {}
        seen.append({number for value in found.values() for number in value.unique().tolist()})
    known = {key for key, number in numbers.items() if number in seen[0]}
    for key in given.keys() - numbers.keys():  # alpha = 2 r doubles A, or B
        halves = [one for one in known if one.startswith(f"{key.removesuffix(_ALPHA)}.")]
        if any(2 * numbers[half] in seen[1] for half in halves):
            known.add(key)
    return known


def _rank(given: Mapping[str, Tensor], stem: str) -> float:
    return next((float(len(given[stem + end])) for end in _DOWN if stem + end in given), 1.0)


def _by_peft(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the layers of text encoders named as peft names them, as the network's are."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
    )

    own = {key: value for key, value in found.items() if not key.startswith("text_encoder")}
    for encoder in sorted({key.split(".")[0] for key in found.keys() - own.keys()}):
        start = f"{encoder}."
        text = {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
        if not any(".lora_A." in key for key in text):
            if any("_lora." in key for key in text):  # diffusers tells that by an output layer, which may not be there
                text = convert_state_dict_to_diffusers(text, StateDictType.DIFFUSERS_OLD)
            text = convert_state_dict_to_peft(text, StateDictType.DIFFUSERS)
        own |= {start + key: value for key, value in text.items()}
    return own
