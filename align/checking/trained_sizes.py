"""Sizes of a policy's trained weights and of the modules it adds to the network, from the config alone."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow.files import lora_files, tensor_files
from alignflow.files.lora_files import LoraFileError
from alignflow.lazy import lazy

if TYPE_CHECKING:
    from torch import nn

    from align.config.model import GatePolicy, UsersPolicy
    from align.config.settings import Config
    from generators.load import adapter
else:
    nn, adapter = lazy("torch.nn"), lazy("generators.load:adapter")


def trained_numbers(config: Config, networks: list[nn.Module], encoders: list[nn.Module]) -> int:
    """Number of trained parameters."""
    if config.policy.kind == "full":
        return sum(value.numel() for network in networks for value in network.parameters())
    if config.policy.kind == "gate":
        blocks = sum(len(child) for child in networks[0].children() if isinstance(child, nn.ModuleList))
        return blocks * len(config.policy.experts) * (config.policy.features + 1)
    if config.policy.kind == "users":
        ends = tuple(f".{end}.to_q" for end in adapter(config.generator.kind).user_attention)
        queries = [module for one in networks for name, module in linears(one).items() if name.endswith(ends)]
        return 2 * embedding_width(config.policy) * sum(module.out_features for module in queries)
    rank, kind, targets = config.policy.rank, adapter(config.generator.kind), config.policy.targets
    if "network" not in config.recipe.learners()["policy"].trains:
        networks = []
    found = []
    for some, own in (networks, kind.lora_targets), (encoders, kind.text_targets):
        ends = tuple(f".{target}" for target in targets or own)
        found += [module for one in some for name, module in linears(one).items() if f".{name}".endswith(ends)]
    return sum(rank * (module.in_features + module.out_features) for module in found)


@lru_cache(maxsize=1024)
def linears(network: nn.Module) -> dict[str, Any]:
    """The linear layers of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def embedding_width(policy: UsersPolicy) -> int:
    """Numbers in a token of the users' embeddings, 1024 where their file is not there."""
    try:
        entries, _ = tensor_files.header(Path(policy.embeddings).expanduser())
    except tensor_files.TensorFileError:
        return 1024
    return next((entry.shape[-1] for entry in entries.values() if entry.shape), 1024)


def experts_size(policy: GatePolicy) -> tuple[float, str]:
    """Bytes in float32 of a gate's frozen LoRAs, counted from their files."""
    numbers, gone = 0, []
    for name, expert in policy.experts.items():
        place = Path(expert.lora).expanduser()
        try:
            file = lora_files.find(place / "lora" if (place / "lora").is_dir() else place)
            numbers += sum(math.prod(shape) for shape in lora_files.inspect(file).shapes.values())
        except LoraFileError:
            gone.append(name)
    without = f", without {', '.join(gone)}, whose file does not exist" if gone else ""
    return 4.0 * numbers, f"{numbers:,} frozen weights of the LoRAs, 4 bytes each{without}"
