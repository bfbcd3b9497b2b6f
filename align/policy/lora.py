"""LoRA on a generator's backbone and text encoders: added, written in diffusers' format, read back."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from align.data.files import writing
from align.policy import lora_foreign
from align.policy.layers import CLIP, PREFIX, Lora, LoraError, linear_layers
from align.policy.lora_layouts import read_lora
from align.policy.shards import whole
from align.policy.switching import PARTS, use_all
from alignflow.files import lora_files, tensor_files
from alignflow.files.foreign_loras import foreign
from alignflow.files.lora_files import ABOUT, LoraFileError
from alignflow.files.lora_files import FILE as FILE
from alignflow.files.lora_files import file_of as file_of
from generators.base import Generator

ADAPTER = "default"
NETWORK = ("network",)


def add_lora(
    generator: Generator,
    rank: int,
    alpha: float,
    targets: Sequence[str] | str | None = None,
    seed: int = 0,
    name: str = ADAPTER,
    parts: Collection[str] = NETWORK,
) -> list[tuple[str, nn.Parameter]]:
    """Add a LoRA ``W + alpha / rank * B A`` to parts of the generator; its parameters alone are trained, in float32.

    ``A`` is normal with deviation ``1 / rank`` and depends on ``seed`` alone, ``B`` is zero: nothing changes at first.

    Targets whose result the network drops (:meth:`~generators.base.Generator.idle`) get none.

    Args:
        targets: ends of module names, or one regular expression for whole names; the generator's own by default.
        name: of the LoRA; others that are there keep their part in what the network computes.
        parts: ``network``, ``text`` or both.

    Returns:
        (name, parameter) in the order of the networks, those of text encoders after them.

    Raises:
        LoraError: a target that is not a linear layer of this model; no text encoder can have a LoRA.
    """
    networks, backbones = generator.part_networks(parts), generator.backbones()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft makes the layers on the CPU
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        torch.default_generator.manual_seed(seed)
        for component, wanted in _targets(generator, targets, parts).items():
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it, an int is not needed
                target_modules=wanted if isinstance(wanted, str) else list(wanted),
                init_lora_weights="gaussian",
                exclude_modules=(idle_layers(generator) if component in backbones else None) or None,
            )
            networks[component].add_adapter(config, name)  # type: ignore[operator]
            _on_device(networks[component], name)
            use_all(networks[component])
    return _trainable(generator, name, parts)


def continue_lora(
    generator: Generator, path: str | os.PathLike[str], name: str = ADAPTER, parts: Collection[str] = NETWORK
) -> list[tuple[str, nn.Parameter]]:
    """:func:`load_lora`, to be trained further; (name, parameter) as :func:`add_lora` gives them.

    Raises:
        LoraError: also where the file changes other parts than those that are trained.
    """
    try:
        file = lora_files.find(Path(path))
        wrong = "" if foreign(file) else lora_files.other_parts(file, parts)
    except LoraFileError as error:
        raise LoraError(str(error)) from None
    if wrong:
        raise LoraError(wrong)
    load_lora(generator, path, name, trains=parts)
    return _trainable(generator, name, parts)


def _trainable(generator: Generator, name: str, parts: Collection[str]) -> list[tuple[str, nn.Parameter]]:
    """One LoRA's parameters, the only trained ones from here, in float32."""
    for network in (generator.backbone, *generator.part_networks(("text",)).values()):
        network.requires_grad_(False)
    parameters = lora_parameters(generator, name, parts)
    for _, value in parameters:
        value.requires_grad_(True)
        value.data = value.data.float()
    return parameters


def lora_parameters(
    generator: Generator, name: str = ADAPTER, parts: Collection[str] = NETWORK
) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of one LoRA that have an effect, in the order of the networks; those of a text encoder begin
    with its name."""
    idle = idle_layers(generator)
    found = [*generator.backbone.named_parameters()] if "network" in parts else []
    found = [pair for pair in found if not any(f".{layer}.lora_" in f".{pair[0]}" for layer in idle)]
    for component, encoder in generator.part_networks({"text"} & set(parts)).items():
        found += [(f"{component}.{key}", value) for key, value in encoder.named_parameters()]
    return [(key, value) for key, value in found if f".{name}." in key]


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
    rounding elsewhere. The file appears whole or not at all. It holds the text encoders' LoRA too. A second expert's
    is beside it, for ``load_lora_weights(folder, weight_name=file_of("transformer_2"),
    load_into_transformer_2=True)``.

    Args:
        name: of the LoRA, where there are several.
    """
    return write_lora(loras_of(generator, name), folder)


def write_lora(loras: Mapping[str, Lora], folder: str | os.PathLike[str]) -> Path:
    """:func:`save_lora` of what :func:`loras_of` gave."""
    folder = Path(folder)
    for file, (tensors, header) in files_of(loras).items():
        path = folder / file
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            tensor_files.save(path, tensors, header)
    return folder / FILE


def loras_of(generator: Generator, name: str | None = None) -> dict[str, Lora]:
    """Component -> its LoRA, :func:`lora_of`, of the backbones and text encoders that have one."""
    found = {component: lora_of(network, name) for component, network in generator.part_networks(PARTS).items()}
    return {component: lora for component, lora in found.items() if lora}


def lora_of(network: nn.Module, name: str | None = None) -> Lora:
    """The LoRA on a network, the one of this name if there are several; float32 on the CPU, empty if it has none.

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


def files_of(loras: Mapping[str, Lora]) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """File name -> tensors and header that diffusers reads; text encoders are in the first network's file."""
    files: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}
    for component, lora in loras.items():
        tensors, header = as_diffusers(lora, f"{component}." if component.startswith("text_encoder") else PREFIX)
        before = files.setdefault(file_of(component), ({}, {"format": "pt", ABOUT: "{}"}))
        about = json.loads(before[1][ABOUT]) | json.loads(header[ABOUT])
        files[file_of(component)] = before[0] | tensors, header | {ABOUT: json.dumps(about)}
    return files


def as_diffusers(lora: Lora, prefix: str = PREFIX) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of the file that diffusers reads.

    Layers of a CLIP text encoder have the names of the published class, ``text_model.encoder...``. Versions of
    transformers differ in the beginning of these names, so that the header leaves it out.
    """
    text = prefix != PREFIX
    short = {name: name.removeprefix(CLIP) if text else name for name in lora}
    tensors = {
        f"{prefix}{CLIP if text else ''}{short[name]}.lora_{part}.weight": value
        for name, pair in lora.items()
        for part, value in zip("AB", pair, strict=True)
    }
    ranks = {short[name]: len(pair[0]) for name, pair in lora.items()}
    most = max(ranks.values())
    about: dict[str, Any] = {"r": most, "lora_alpha": most, "target_modules": sorted(ranks)}
    start = "" if text else "^"
    if others := {f"{start}{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != most}:
        about |= {"rank_pattern": others, "alpha_pattern": others}
    return tensors, {"format": "pt", ABOUT: json.dumps({prefix + key: about[key] for key in about})}


def load_lora(
    generator: Generator, path: str | os.PathLike[str], name: str = ADAPTER, *, trains: Collection[str] | None = None
) -> None:
    """Load a LoRA file onto the generator; nothing is trained then.

    Layouts of :mod:`align.policy.lora_layouts` are read exactly, others by diffusers' converters
    (:mod:`align.policy.lora_foreign`).

    Args:
        path: the file, or the folder that holds it; a second expert's is read if it is beside it.
        name: of the LoRA; others that are there keep their part in what the network computes.
        trains: parts that are trained further; a converted file's text encoders are left out where they are not.

    Raises:
        LoraError: no such file, damaged, or made for another model; changed biases of a LoRA that is trained.
    """
    try:
        file = lora_files.find(Path(path))
    except LoraFileError as error:
        raise LoraError(str(error)) from None
    try:
        read, biases, notes = _read(generator, file), dict[str, Tensor](), tuple[str, ...]()
    except LoraError as own:
        with lora_foreign.converted(generator.pipeline, file, own) as other:
            try:
                read, biases, notes = _read(generator, file, other.path), dict(other.biases), other.notes
            except LoraError:
                raise own from None
    encoders = [*generator.part_networks(("text",)).values()]
    if trains is not None and "text" not in trains:
        dropped = [network for network, lora in read if lora and network in encoders]
        notes += (f"{file}: left out the LoRA of {len(dropped)} text encoders, which are not trained",) * bool(dropped)
        read = [(network, lora) for network, lora in read if network not in dropped]
    held = {"text" if network in encoders else "network" for network, lora in read if lora}
    if trains is not None and (wrong := lora_files.differing(file, held, trains)):
        raise LoraError(wrong)
    if biases and trains:
        raise LoraError(f"{file} changes {len(biases)} biases, which a LoRA that is trained does not have")
    lora_foreign.say(notes)
    for network, lora in read:
        if lora:
            put_lora(network, lora, name, biases)
    generator.text_changed()


def _read(generator: Generator, file: Path, converted: Path | None = None) -> list[tuple[nn.Module, Lora]]:
    """Network -> its LoRA of a file and, where it lies beside, of a second expert's; nothing is changed.

    Args:
        converted: the same file in diffusers' layout.
    """
    encoders, here = generator.part_networks(("text",)), converted or file
    try:
        strange = sorted(lora_files.encoders(here) - {"", *encoders})
    except LoraFileError as error:
        raise LoraError(str(error)) from None
    if strange:
        pipeline, known = type(generator.pipeline).__name__, " and ".join(encoders) or "no text encoder"
        raise LoraError(f"{file} changes {' and '.join(strange)}; of a {pipeline}, a LoRA may change {known}")
    read: list[tuple[nn.Module, Lora]] = []
    for component, network in generator.backbones().items():
        own = here if component == "transformer" else lora_files.second(file, component)
        read += [(network, read_lora(own, network))] if own.is_file() else []
    return read + [(encoder, read_lora(here, encoder, component)) for component, encoder in encoders.items()]


def _on_device(network: nn.Module, adapter: str) -> None:
    """Move a LoRA to the network's device: peft makes it beside each weight, also beside those kept on the CPU."""
    device = next(network.parameters()).device
    for name, value in network.named_parameters():
        if f".{adapter}." in name:
            value.data = value.data.to(device)


def put_lora(network: Any, lora: Lora, adapter: str = ADAPTER, biases: Mapping[str, Tensor] | None = None) -> None:
    """Put a LoRA onto exactly its layers, in float32 whatever the base is stored in.

    Args:
        biases: layer with diffusers' prefix -> change ``[out]`` of its bias.
    """
    changed = {key.removeprefix(PREFIX): value for key, value in (biases or {}).items() if key.startswith(PREFIX)}
    changed = {key: value for key, value in changed.items() if key in lora}
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
        lora_bias=bool(changed),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        network.add_adapter(config, adapter)
        for name, (a, b) in lora.items():
            layer = network.get_submodule(name)
            for part, value in ((layer.lora_A, a), (layer.lora_B, b)):
                weight = part[adapter].weight
                weight.data = value.to(weight.device, torch.float32)
            if changed:
                bias = layer.lora_B[adapter].bias
                bias.data = changed.get(name, torch.zeros(len(b))).to(bias.device, torch.float32)
    _on_device(network, adapter)
    use_all(network)
    network.requires_grad_(False)


def _targets(
    generator: Generator, targets: Sequence[str] | str | None, parts: Collection[str]
) -> dict[str, list[str] | str]:
    """Component -> its targets. Each of those asked for must be found in some network, and one at least in every part;
    of the generator's own at least one (a small model may lack some)."""
    found: dict[str, list[str] | str] = {}
    everything: list[str] = []
    lost = [targets] if isinstance(targets, str) else list(targets or ())
    for part in parts:
        networks = generator.part_networks((part,))
        if not networks:
            pipeline = type(generator.pipeline).__name__
            raise LoraError(f"diffusers reads no LoRA of text encoders into a {pipeline}: train the network alone")
        names = list(linear_layers(next(iter(networks.values()))))  # experts are alike, and so are encoders
        own = generator.lora_targets if part == "network" else generator.text_targets
        wanted = [targets] if isinstance(targets, str) else list(own if targets is None else targets)
        ends = [end for end in wanted if any(_matches(n, end if isinstance(targets, str) else [end]) for n in names)]
        if not ends:
            raise _unmatched(wanted, names, part)
        used = targets if isinstance(targets, str) else ends
        if part == "network" and all(name in idle_layers(generator) for name in names if _matches(name, used)):
            raise LoraError(f"LoRA targets {wanted} match only layers whose output this network discards")
        found |= dict.fromkeys(networks, used)
        lost, everything = [end for end in lost if end not in ends], everything + names
    if lost:
        raise _unmatched(lost, everything)
    return found


def _unmatched(targets: Sequence[str], names: Sequence[str], part: str = "network") -> LoraError:
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    where = " of the text encoders" if part == "text" else ""
    return LoraError(f"LoRA targets {list(targets)} match no linear layer{where}; there are {', '.join(ends)}")
