"""A LoRA on a judge: added for training, written and read in peft's file layout.

peft is called directly: the adapter methods of transformers accept only some versions of peft.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rewards.base import RewardError

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = "default"


def add_lora(model: Any, rank: int, alpha: float, targets: Sequence[str], seed: int) -> list[nn.Parameter]:
    """Add a LoRA that changes nothing at first to the language layers; its parameters, in float32, alone are trained.

    Raises:
        RewardError: no linear layer is called so.
    """
    ends = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [target for target in targets if target not in ends]:
        raise RewardError(f"lora.targets {missing} match no linear layer; there are {', '.join(sorted(ends))}")
    among = rf".*language_model\..*\.({'|'.join(targets)})"
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=among)  # type: ignore[arg-type]  # peft divides it
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)
    found = [value for value in model.parameters() if value.requires_grad]
    for value in found:
        value.data = value.data.float()
    return found


def load_lora(model: Any, folder: Path) -> None:
    """Put the LoRA of a folder onto the model.

    Raises:
        RewardError: not there, damaged, or made for another model.
    """
    file = folder / FILE
    if not file.is_file():
        raise RewardError(f"judge.lora: no {FILE} in {folder}")
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key.removeprefix(PREFIX): tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RewardError(f"judge.lora: {file} is no whole safetensors file: {error}") from error
    sizes = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wrong = [key for key, shape in shapes.items() if not _fits(key, shape, sizes)]
    if wrong or not shapes:
        first = ", ".join(wrong[:3]) or "none at all"
        raise RewardError(
            f"judge.lora: {file} was not made for this {type(model).__name__}: {len(wrong)} of {len(shapes)} keys do "
            f"not fit, first {first}"
        )
    try:
        inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), model, NAME)
    except (OSError, ValueError, TypeError, KeyError) as error:  # adapter_config.json is damaged or missing
        raise RewardError(f"judge.lora: {folder}: {str(error).splitlines()[0]}") from error
    tensors = {key.removeprefix(PREFIX): value for key, value in load_file(file).items()}
    set_peft_model_state_dict(model, tensors, NAME)


def save_lora(model: Any, folder: Path) -> None:
    """Write the LoRA that :func:`add_lora` added: ``adapter_model.safetensors`` and ``adapter_config.json``."""
    tensors = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    whole = {PREFIX + key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(whole, folder / FILE, metadata={"format": "pt"})
    model.peft_config[NAME].save_pretrained(str(folder))


def _fits(key: str, shape: tuple[int, ...], layers: dict[str, nn.Linear]) -> bool:
    name, _, part = key.partition(".lora_")
    layer = layers.get(name)
    if layer is None or len(shape) != 2:
        return False
    return shape[1] == layer.in_features if part == "A.weight" else shape[0] == layer.out_features
