"""Published weight files -> state dicts, and state dicts -> models, with every mismatch named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignflow.files import weights
from rewards.base import RewardError
from rewards.networks.hub import typed_line

_MARKS = {  # a key that only this architecture has -> what it is called; the first that is found counts
    "blip.visual_encoder.cls_token": "ImageReward (BLIP with a reward head)",
    "visual_encoder.cls_token": "BLIP",
    "visual.trunk.": "open_clip with a timm vision tower",
    "visual.attnpool.": "open_clip with a ResNet",
    "visual.conv1.weight": "CLIP in the layout of open_clip",
    "vision_model.head.probe": "SigLIP of transformers",
    "vision_model.embeddings.class_embedding": "CLIPModel of transformers",
    "layers.7.weight": "LAION aesthetic head v2 (MLP)",
    "lora_A": "a LoRA",
    "lora_down": "a LoRA",
    "down_blocks.": "a diffusion U-Net or VAE",
    "transformer_blocks.": "a diffusion transformer",
    "rm_head.": "a reward head on a language model",
    "attention_query_": "SoliReward (InternVL with query attention)",
    "mlp1.": "InternVL in the layout of its own code",
    "lm_head.": "a language model",
}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or a PyTorch file, the latter without running code that it may hold.

    A training checkpoint's are taken out of its ``state_dict``.

    Raises:
        RewardError: cut off, of another kind, TorchScript, more than tensors, NaN or infinite.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickler, zip and safetensors readers each raise their own
        raise RewardError(f"{path}: {_why_unread(path, error)} ({typed_line(error)})") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise RewardError(f"{path} holds {type(found).__name__}, not a state dict of tensors")
    if broken := weights.not_finite(found.items()):
        said = f"{weights.counted(len(broken), 'weight')} not finite ({weights.first(broken)})"
        raise RewardError(f"{path} holds NaN or infinity: {said}; download it again")
    return dict(found)


def _why_unread(path: Path, error: Exception) -> str:
    if "TorchScript" in str(error):
        return "is a TorchScript archive, which runs code; give a state dict, or the hub id of the same weights"
    start = path.read_bytes()[:200] if path.stat().st_size < 10_000 else b""
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run git lfs pull"
    if "Weights only load failed" in str(error) or "weights_only" in str(error):
        return "is not a PyTorch file, or holds more than tensors; only plain state dicts are read"
    return "is not a weight file, or is incomplete; download it again"


def looks_like(keys: Iterable[str]) -> str:
    """Architecture to which a state dict's keys belong, in words."""
    keys = list(keys)
    for mark, name in _MARKS.items():
        if any(mark in key for key in keys):
            return name
    if set(keys) == {"weight", "bias"}:
        return "one linear layer (LAION aesthetic head v1)"
    return "nothing known here"


def check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, what: str) -> None:
    """Same keys, same shapes.

    Args:
        where: the file, for the message.
        what: the architecture that was expected.

    Raises:
        RewardError: says what is missing, unexpected or of another shape, and what the file looks like.
    """
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{key} {list(state[key].shape)} for {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    found = {"missing": missing, "unexpected": surplus, "of another shape": shapes}
    wrong = [
        f"{len(keys)} weights {how} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
        for how, keys in found.items()
        if keys
    ]
    if wrong:
        raise RewardError(f"{where} is not {what}: {'; '.join(wrong)}; it looks like {looks_like(state)}")


def skeleton(make: Any) -> dict[str, Tensor]:
    """State dict of what ``make()`` builds, shapes without memory."""
    with torch.device("meta"):
        model: nn.Module = make()
    return dict(model.state_dict())


def counted(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered blocks ``prefix0.``, ``prefix1.``, ... there are."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
