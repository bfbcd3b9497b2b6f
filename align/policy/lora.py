"""LoRA on a generator's backbone: added, written in diffusers' format, read back."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from align.data.files import writing
from align.policy.shards import whole
from alignflow.errors import AlignflowError
from alignflow.files import lora_files, tensor_files
from alignflow.files.lora_files import FILE as FILE
from alignflow.files.lora_files import LoraFileError
from alignflow.files.lora_files import file_of as file_of
from alignflow.lazy import lazy
from generators.base import Generator

if TYPE_CHECKING:
    from align.policy.lora_layouts import read_lora
else:
    read_lora = lazy("align.policy.lora_layouts:read_lora")


PREFIX = "transformer."
ADAPTER = "default"

Lora = dict[str, tuple[Tensor, Tensor]]
"""Layer -> (A ``[r, in]``, B ``[out, r]``) of the change ``B A`` of its weight; B has the scale ``alpha / rank``."""


class LoraError(AlignflowError, ValueError):
    """A LoRA that does not fit the model; names the modules or keys."""

    exit_code = 2


def add_lora(
    generator: Generator,
    rank: int,
    alpha: float,
    targets: Sequence[str] | str | None = None,
    seed: int = 0,
    name: str = ADAPTER,
) -> list[tuple[str, nn.Parameter]]:
    """Add a LoRA ``W + alpha / rank * B A`` to the backbone; its parameters alone are trained, in float32.

    ``A`` is normal with deviation ``1 / rank`` and depends on ``seed`` alone, ``B`` is zero: nothing changes at first.

    Targets whose result the network drops (:meth:`~generators.base.Generator.idle`) get none.

    Args:
        targets: ends of module names, or one regular expression for whole names; the generator's own by default.
        name: of the LoRA; others that are there keep their part in what the network computes.

    Returns:
        (name, parameter) in the backbone's order.

    Raises:
        LoraError: a target that is no linear layer of this model.
    """
    _check_targets(generator, targets)
    wanted = generator.lora_targets if targets is None else targets
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it, an int is not needed
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
        init_lora_weights="gaussian",
        exclude_modules=idle_layers(generator) or None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft makes the layers on the CPU
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        torch.default_generator.manual_seed(seed)
        for network in generator.backbones().values():
            network.add_adapter(config, name)  # type: ignore[operator]
            _use_all(network)
    return _trainable(generator, name)


def continue_lora(
    generator: Generator, path: str | os.PathLike[str], name: str = ADAPTER
) -> list[tuple[str, nn.Parameter]]:
    """:func:`load_lora`, to be trained further; (name, parameter) as :func:`add_lora` gives them."""
    load_lora(generator, path, name)
    return _trainable(generator, name)


@contextmanager
def lora_only(generator: Generator, *names: str) -> Iterator[None]:
    """Inside the block the backbone computes with these of its LoRAs and no others; without names, as the base.

    No LoRA is changed, nor which parameters are trained. Gradient checkpointing computes again in the backward pass,
    which then belongs inside the block too.
    """
    layers = [module for module in generator.backbone.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer, layer.active_adapters, layer.disable_adapters) for layer in layers]
    # peft's switches also change which parameters are trained
    trained = [(value, value.requires_grad) for layer in layers for value in layer.parameters()]

    def restore() -> None:
        for value, wanted in trained:
            value.requires_grad_(wanted)

    for layer in layers:
        if names:
            layer.set_adapter(list(names))
        layer.enable_adapters(bool(names))
    restore()
    try:
        yield
    finally:
        for layer, active, off in before:
            layer.set_adapter(active)
            layer.enable_adapters(not off)
        restore()


def lora_off(generator: Generator) -> AbstractContextManager[None]:
    """Inside the block the backbone computes as the base: :func:`lora_only` without names."""
    return lora_only(generator)


def drop_lora(generator: Generator, name: str) -> None:
    """Take one LoRA off the backbone; others stay."""
    for network in generator.backbones().values():
        adapters = getattr(network, "peft_config", {})
        if list(adapters) == [name]:
            network.unload_lora()  # type: ignore[operator]
        elif name in adapters:
            network.delete_adapters(name)  # type: ignore[operator]
            _use_all(network)
            network.requires_grad_(False)


def _use_all(network: Any) -> None:
    """Every LoRA on the network takes part: peft leaves on the last one alone."""
    names = list(getattr(network, "peft_config", {}))
    if names:
        network.set_adapter(names)


def _trainable(generator: Generator, name: str) -> list[tuple[str, nn.Parameter]]:
    """One LoRA's parameters, the only trained ones from here, in float32."""
    generator.backbone.requires_grad_(False)
    parameters = lora_parameters(generator, name)
    for _, value in parameters:
        value.requires_grad_(True)
        value.data = value.data.float()
    return parameters


def lora_parameters(generator: Generator, name: str = ADAPTER) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of one LoRA that have an effect, in the backbone's order."""
    idle = idle_layers(generator)
    return [
        (key, value)
        for key, value in generator.backbone.named_parameters()
        if f".{name}." in key and not any(f".{layer}.lora_" in f".{key}" for layer in idle)
    ]


def idle_layers(generator: Generator, targets: Sequence[str] | str | None = None) -> list[str]:
    """Names of the linear layers that ``targets`` match (all by default) and nothing trained in which has an effect."""
    starts = tuple(f"{start}." for start in generator.idle())
    names = {name for network in generator.backbones().values() for name in linear_layers(network)}
    matched = names if targets is None else {name for name in names if _matches(name, targets)}
    return sorted(name for name in matched if f"{name}.".startswith(starts)) if starts else []


def _matches(name: str, targets: Sequence[str] | str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == end or name.endswith("." + end) for end in targets)


def save_lora(generator: Generator, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` as an untouched pipeline's ``load_lora_weights(folder)`` reads it.

    ``alpha / rank`` is multiplied into ``B``, so that readers which know no alpha are right too; the header says the
    same (alpha = rank). Samples are then equal bit for bit where ``alpha / rank`` is a power of two and to float32
    rounding elsewhere. The file appears whole or not at all. A second expert's lies beside it, for
    ``load_lora_weights(folder, weight_name=file_of("transformer_2"), load_into_transformer_2=True)``.

    Args:
        name: of the LoRA, where there are several.
    """
    return write_lora(
        {component: lora_of(network, name) for component, network in generator.backbones().items()}, folder
    )


def write_lora(loras: Mapping[str, Lora], folder: str | os.PathLike[str]) -> Path:
    """:func:`save_lora` of what :func:`lora_of` gave for each component."""
    folder = Path(folder)
    for component, lora in loras.items():
        tensors, header = as_diffusers(lora)
        path = folder / file_of(component)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            tensor_files.save(path, tensors, header)
    return folder / FILE


def lora_of(network: nn.Module, name: str | None = None) -> Lora:
    """The LoRA on a network, the one of this name if there are several; float32 on the CPU, empty where it has none.

    Every process must call it where the network is sharded.
    """
    found: Lora = {}
    for key, module in network.named_modules():
        for adapter in getattr(module, "lora_A", {}):
            if name not in (None, adapter):
                continue
            layer: Any = module
            a, b = (whole(part[adapter].weight).float().cpu().contiguous() for part in (layer.lora_A, layer.lora_B))
            found[key] = (a, b * layer.scaling[adapter])
    return found


def as_diffusers(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of the file that diffusers reads."""
    tensors = {
        f"{PREFIX}{name}.lora_{part}.weight": value
        for name, pair in lora.items()
        for part, value in zip("AB", pair, strict=True)
    }
    ranks = {name: len(pair[0]) for name, pair in lora.items()}
    most = max(ranks.values())
    about: dict[str, Any] = {"r": most, "lora_alpha": most, "target_modules": sorted(lora)}
    if others := {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != most}:
        about |= {"rank_pattern": others, "alpha_pattern": others}
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps({PREFIX + key: about[key] for key in about})}


def load_lora(generator: Generator, path: str | os.PathLike[str], name: str = ADAPTER) -> None:
    """Load a LoRA file in any layout of :mod:`align.policy.lora_layouts` onto the generator; nothing is trained then.

    Args:
        path: the file, or the folder that holds it; a second expert's is read where it lies beside.
        name: of the LoRA; others that are there keep their part in what the network computes.

    Raises:
        LoraError: no such file, damaged, or made for another model.
    """
    try:
        file = lora_files.find(Path(path))
    except LoraFileError as error:
        raise LoraError(str(error)) from None
    for component, network in generator.backbones().items():
        own = file if component == "transformer" else lora_files.second(file, component)
        if own.is_file():
            _inject(network, read_lora(own, network), name)


def _inject(network: Any, lora: Lora, adapter: str) -> None:
    """Put a LoRA onto exactly its layers, in float32 whatever the base is stored in."""
    ranks = {name: len(pair[0]) for name, pair in lora.items()}
    most = max(ranks.values())
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=f"({'|'.join(re.escape(name) for name in lora)})",
        init_lora_weights=False,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        network.add_adapter(config, adapter)
        for name, (a, b) in lora.items():
            layer = network.get_submodule(name)
            for part, value in ((layer.lora_A, a), (layer.lora_B, b)):
                weight = part[adapter].weight
                weight.data = value.to(weight.device, torch.float32)
    _use_all(network)
    network.requires_grad_(False)


def linear_layers(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> ``(out, in)`` of a network's linear layers; weights stored in fewer bits have another shape."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def _check_targets(generator: Generator, targets: Sequence[str] | str | None) -> None:
    """Every target asked for must be found; of the generator's own at least one (a small model may lack some)."""
    names = list(linear_layers(next(iter(generator.backbones().values()))))  # experts are alike
    if isinstance(targets, str):
        wanted: Sequence[str] = [targets]
        missing = [] if any(_matches(name, targets) for name in names) else [targets]
    else:
        wanted = generator.lora_targets if targets is None else targets
        missing = [end for end in wanted if not any(_matches(name, [end]) for name in names)]
    if not wanted or len(missing) == len(wanted) or (missing and targets is not None):
        ends = sorted({".".join(name.split(".")[-2:]) for name in names})
        raise LoraError(f"LoRA targets {missing} match no linear layer; there are {', '.join(ends)}")
    useful = targets if isinstance(targets, str) else wanted
    if all(name in idle_layers(generator) for name in names if _matches(name, useful)):
        raise LoraError(f"LoRA targets {list(wanted)} match only layers whose output this network discards")
