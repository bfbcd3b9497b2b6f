"""A LoRA on a judge or another language model: added for training, written and read in peft's file layout.

peft is called directly: the adapter methods of transformers accept only some versions of peft.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from alignflow.files import lora_files, tensor_files
from alignflow.files.lora_files import LoraFileError
from alignflow.files.weights import first
from alignflow.text import first_line, printable
from rewards.base import RewardError

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = "default"


def add_lora(
    model: Any, rank: int, alpha: float, targets: Sequence[str], seed: int, *, inside: str = r".*language_model\."
) -> list[nn.Parameter]:
    """Add a LoRA that changes nothing at first to the language layers; its parameters, in float32, alone are trained.

    Args:
        inside: pattern of what the names of the language layers begin with; lm_head stands outside.

    Raises:
        RewardError: no linear layer is called so.
    """
    ends = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [target for target in targets if target not in ends]:
        raise RewardError(f"lora.targets {missing} match no linear layer; there are {', '.join(sorted(ends))}")
    among = rf"(?:{inside}.*\.)?({'|'.join(targets)})"  # without anything before it: lm_head
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=among)  # type: ignore[arg-type]  # peft divides it
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)
    found = [value for value in model.parameters() if value.requires_grad]
    for value in found:
        value.data = value.data.float()
    return found


def load_lora(model: Any, folder: Path, setting: str = "judge.lora") -> None:
    """Put the LoRA of a folder onto the model.

    Args:
        setting: what named the folder, for messages.

    Raises:
        RewardError: not there, damaged, or made for another model.
    """
    file = folder / FILE
    try:
        if not file.is_file():
            raise LoraFileError(f"no {FILE} in {folder}")
        found = lora_files.inspect(file)
        tensors = lora_files.tensors(found, scaled=False)  # peft reads alpha from the settings
    except LoraFileError as error:
        raise RewardError(f"{setting}: {error}") from None
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wrong = [stem for stem, pair in tensors.items() if not _fits(layers.get(stem.removeprefix(PREFIX)), pair)]
    if wrong:
        raise RewardError(
            f"{setting}: {file} was not made for this {type(model).__name__}: {len(wrong)} of {len(tensors)} pairs do "
            f"not fit, first {printable(first(wrong))}"
        )
    try:
        inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), model, NAME)
    except Exception as error:  # adapter_config.json is damaged or missing; peft raises whatever its readers raise
        raise RewardError(f"{setting}: {folder}: {first_line(error)}") from error
    _fill(model, {stem.removeprefix(PREFIX): pair for stem, pair in tensors.items()}, folder, setting)


def _fill(model: Any, pairs: dict[str, tuple[Any, Any]], folder: Path, setting: str) -> None:
    """Put the pairs into the layers that the settings made; raises RewardError where those are others."""
    made = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if set(made) != set(pairs):
        other = sorted(set(made) ^ set(pairs))
        raise RewardError(
            f"{setting}: adapter_config.json of {folder} adapts {len(made)} layers, {FILE} holds {len(pairs)}; they "
            f"differ in {printable(first(other))}"
        )
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            for part, value in ((made[name].lora_A, a), (made[name].lora_B, b)):
                part[NAME].weight.copy_(value)


def save_lora(model: Any, folder: Path) -> None:
    """Write the LoRA that :func:`add_lora` added: ``adapter_model.safetensors`` and ``adapter_config.json``."""
    tensors = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    whole = {PREFIX + key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    tensor_files.save(folder / FILE, whole, {"format": "pt"})
    model.peft_config[NAME].save_pretrained(str(folder))


def _fits(layer: nn.Linear | None, pair: tuple[Any, Any]) -> bool:
    a, b = pair
    return layer is not None and a.shape[1] == layer.in_features and b.shape[0] == layer.out_features
