"""The networks of a pipeline folder, each loaded by its own class with every weight accounted for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignflow.files import weights
from alignflow.text import first_line
from generators.errors import GeneratorError

LIBRARIES = ("diffusers", "transformers")


def networks(
    folder: Path,
    parts: Mapping[str, tuple[str, str]],
    dtype: torch.dtype,
    stored: Mapping[str, Any] | None = None,
) -> dict[str, nn.Module]:
    """Component -> network, of the components whose class is a network of diffusers or transformers.

    Args:
        folder: a pipeline's.
        parts: component -> (library, class).
        dtype: of the weights.
        stored: component -> quantisation of its weights.

    Raises:
        GeneratorError: a component that does not load, lacks a weight, or holds NaN; names component and keys.
    """
    found = {}
    for name, (library, class_name) in parts.items():
        cls = getattr(import_module(library), class_name, None) if library in LIBRARIES else None
        if isinstance(cls, type) and issubclass(cls, ModelMixin | PreTrainedModel):
            found[name] = load_network(folder / name, name, cls, dtype, (stored or {}).get(name))
    return found


def load_network(folder: Path, name: str, cls: Any, dtype: torch.dtype, quantisation: Any = None) -> nn.Module:
    """A network of class ``cls`` from its folder; raises GeneratorError as :func:`networks` does."""
    options: dict[str, Any] = {"dtype" if issubclass(cls, PreTrainedModel) else "torch_dtype": dtype}
    if quantisation is not None:
        options["quantization_config"] = quantisation
    try:
        network, report = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # diffusers and transformers raise whatever their readers raise
        said = f"{type(error).__name__}: {first_line(error)}"
        raise GeneratorError(f"{name}: {folder} does not load as {cls.__name__}: {said}") from error
    # a transformers file may hold heads that the class of a text encoder does not have
    top = {key.split(".")[0] for key in network.state_dict()} if issubclass(cls, PreTrainedModel) else None
    check(folder, name, network, report, top)
    return network


def check(folder: Path, name: str, network: nn.Module, report: Mapping[str, Any], top: Collection[str] | None) -> None:
    """Raise GeneratorError unless every weight of a network came from its files and is finite."""
    problems = weights.unaccounted(report, top)
    if empty := [key for key, value in _tensors(network) if value.is_meta] if not problems else []:
        problems.append(f"{weights.counted(len(empty), 'weight')} missing ({weights.first(empty)})")
    if problems:
        raise GeneratorError(
            f"{name}: {folder} is not a whole {type(network).__name__}: {'; '.join(problems)}; download it again, or "
            "use files and a config.json that belong together"
        )
    check_finite(folder, name, network)


def check_finite(folder: Path, name: str, network: nn.Module) -> None:
    """Raise GeneratorError if a network holds NaN or infinity; weights stored in fewer bits are passed over."""
    plain = ((key, value) for key, value in _tensors(network) if type(value) in (Tensor, nn.Parameter))
    if broken := weights.not_finite(plain):
        said = f"{weights.counted(len(broken), 'weight')} not finite ({weights.first(broken)})"
        raise GeneratorError(
            f"{name}: {folder} holds NaN or infinity: {said}; download it again, or load it as float32"
        )


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and stored buffers; buffers that a network computes may hold masks of -inf."""
    kept = network.state_dict(keep_vars=True)
    return chain(network.named_parameters(), ((k, v) for k, v in network.named_buffers() if k in kept))
