"""From ``(kind, path)`` to a ready :class:`~generators.base.Generator`, or a message with a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

import generators
from alignflow import hub, plugins
from alignflow.paths import expanded
from alignflow.text import first_line
from alignflow.words import listing
from alignflow.worlds.shapes import pipelines
from generators import fp8
from generators.base import Generator, GeneratorError, Options
from generators.folder import check_parts, components, read_index, single_file
from generators.memory import place, quantisation, set_attention, thrifty_vae
from generators.parts import check_finite, networks
from generators.settings import Memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ANY = "DiffusionPipeline"  # the pipeline class of an adapter that reads every one
TRAINED = ("transformer", "transformer_2")  # components that may be stored in fewer bits


def adapter(kind: str) -> type[Generator]:
    """The Generator subclass called ``kind``: a file of ``generators/``, or ``package.module:Class`` or
    ``file.py:Class`` from elsewhere."""
    if ":" in kind:
        try:
            found = [plugins.load(kind)]
        except plugins.PluginError as error:
            raise GeneratorError(f"generator {kind!r:.200}: {error}") from error
    elif kind in generators.kinds():
        module = import_module(f"generators.adapters.{kind}")
        found = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    else:
        known = listing(generators.kinds(), kind)
        raise GeneratorError(f"no generator {kind!r:.80}; there are {known}, or package.module:Class")
    for value in found:
        if isinstance(value, type) and issubclass(value, Generator):
            return value
    raise GeneratorError(f"generator {kind!r:.200}: is not a subclass of generators.base.Generator")


def load(
    kind: str,
    path: str,
    *,
    dtype: str = "float32",
    options: Options | None = None,
    device: torch.device | str = "cpu",
    memory: Memory | None = None,
) -> Generator:
    """Load a pipeline and see it as a velocity field.

    Args:
        kind: adapter, see :func:`adapter`.
        path: an embedded world of :data:`alignflow.worlds.shapes.WORLDS`, a folder written by ``save_pretrained``, or
            a hub id ``owner/name``.
        dtype: ``float32``, ``bfloat16`` or ``float16``, for every network of the pipeline.
        options: settings of the pipeline.
        device: device of the networks.
        memory: storage and placement of their weights.

    Raises:
        GeneratorError: nothing there, another kind of pipeline, a component missing or damaged, hub unreachable, or a
            way of saving memory that this pipeline or machine does not support.
    """
    _check_dtype(dtype)
    cls = adapter(kind)
    folder = find(kind, path)
    index = _check(folder, cls)
    # a component saved as None is not taken as None by from_pretrained unless it is passed again
    optional = index if cls.pipeline_class == ANY else cls.optional
    absent: dict[str, Any] = {name: None for name in optional if _absent(index.get(name, [None]))}
    memory = memory or Memory()
    if memory.compute == "fp8":
        fp8.require(torch.device(device))  # before weights are loaded
    parts = components(index)
    trained = [name for name in TRAINED if name in parts]
    stored = quantisation(memory.quantise, trained, DTYPES[dtype])
    ready = networks(folder, parts, DTYPES[dtype], stored.quant_mapping if stored else None)
    pipeline = _pipeline(folder, index["_class_name"], cls.pipeline_class, dtype=DTYPES[dtype], **absent, **ready)
    _check_others(pipeline, folder, ready)
    pipeline.set_progress_bar_config(disable=True)
    resting = place(pipeline, device, memory, trained)
    for name in trained if memory.compute == "fp8" else ():
        fp8.use_products(pipeline.components[name])
    generator = cls(pipeline, options)
    generator.resting = resting
    set_attention(generator.backbones().values(), memory.attention, DTYPES[dtype], generator.device)
    if memory.vae_tiling or memory.vae_slicing:
        thrifty_vae(pipeline.vae, memory)
    return generator


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise GeneratorError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")


def _check_others(pipeline: Any, folder: Path, ready: Mapping[str, Any]) -> None:
    """Raise GeneratorError if a network that the pipeline loaded itself, not in ``ready``, holds NaN or infinity."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name not in ready:
            check_finite(folder / name, name, part)


def _pipeline(folder: Path, name: str, wanted: str, **given: Any) -> Any:
    """The pipeline of class ``name`` in a folder; GeneratorError if it does not load."""
    try:
        return _pipeline_class(name).from_pretrained(folder, local_files_only=True, **given)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # tokenizers and schedulers raise whatever their readers raise
        raise GeneratorError(f"{folder} does not load as {wanted}: {_named(error)}") from error


def _pipeline_class(name: str) -> Any:
    """The class itself, which takes optional components from us; the base class would load those a second time."""
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else DiffusionPipeline


def _absent(entry: Any) -> bool:
    """Whether an entry of model_index.json stands for a component that is not there."""
    return isinstance(entry, list) and not any(entry)


def find(kind: str, path: str) -> Path:
    """Folder that holds the pipeline: embedded, local, or downloaded from the hub unless it already was."""
    if have := pipelines(path):
        if kind not in have:
            raise GeneratorError(f"the embedded world {path!r} has no {kind!r}; it has {', '.join(have)}")
        return have[kind]
    folder = expanded(path, GeneratorError)
    if folder.is_dir():
        return folder
    if said := single_file(folder):
        raise GeneratorError(said)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise GeneratorError(f"no folder {folder}; path is an embedded world, a folder, or a hub id owner/name")
    return _from_hub(path)


def _from_hub(repo: str) -> Path:
    """The repository's files, from the cache when they are all there, else downloaded; fails fast without a network."""
    try:
        hf_hub_download(repo, DiffusionPipeline.config_name, local_files_only=True)
        return Path(DiffusionPipeline.download(repo, local_files_only=True))
    except (OSError, HFValidationError):  # not, or not completely, in the cache
        said = hub.unavailable(repo)
    if said:
        raise GeneratorError(f"no folder {repo!r}, {said}")
    try:
        return Path(DiffusionPipeline.download(repo))
    except (OSError, ValueError) as error:
        raise GeneratorError(f"no folder {repo!r}, and the hub answered: {_named(error)}") from error


def _check(folder: Path, cls: type[Generator]) -> dict[str, Any]:
    """The folder's model_index.json; raises if it names another class, lacks a part, or a weight file is cut."""
    index = read_index(folder)
    if cls.pipeline_class not in (index["_class_name"], ANY):
        known = ", ".join(f"{kind} ({adapter(kind).pipeline_class})" for kind in generators.kinds())
        raise GeneratorError(
            f"{folder} holds a {index['_class_name']}, this adapter reads {cls.pipeline_class}; adapters: {known}"
        )
    check_parts(folder, index)
    for file in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise GeneratorError(
                f"{file} is damaged or cut short ({first_line(error)}); copy or download it again"
            ) from error
    return index


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
