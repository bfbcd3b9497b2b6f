"""Networks of a pipeline without its weights, from its ``config.json`` files or from published sizes.

Networks are built on the meta device, where weights have shapes but take no memory, so that parameters are counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignflow.errors import ConfigError
from alignflow.paths import expanded
from alignflow.worlds.shapes import pipelines

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Part:
    """A network of a pipeline.

    Args:
        library: ``diffusers`` or ``transformers``.
        name: its class there.
        config: arguments of the class; empty if only the count is known.
        count: number of parameters, if it is known without building the network.
    """

    library: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    count: int | None = None


def parts_of(kind: str, path: str) -> dict[str, Part] | None:
    """Component name -> network of a pipeline, from its folder, the hub's cache or :data:`KNOWN`; None if unknown."""
    folder = pipelines(path).get(kind) or expanded(path, ConfigError)
    if not folder.is_dir():
        folder = _cached(path) or folder
    if (folder / "model_index.json").is_file():
        return _read(folder)
    return KNOWN.get(path)


def _cached(repo: str) -> Path | None:
    """Snapshot folder of a repository in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, "model_index.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _read(folder: Path) -> dict[str, Part]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    found = {}
    for name, entry in index.items():
        file = folder / name / "config.json"
        if isinstance(entry, list) and entry[0] in ("diffusers", "transformers") and file.is_file():
            found[name] = Part(entry[0], entry[1], json.loads(file.read_text(encoding="utf-8")))
    return found


def on_meta(part: Part) -> nn.Module:
    """The network on the meta device."""
    return _on_meta(part.library, part.name, json.dumps(part.config, sort_keys=True))


@lru_cache(maxsize=32)
def _on_meta(library: str, name: str, config: str) -> nn.Module:
    from importlib import import_module

    import torch

    cls, values = getattr(import_module(library), name), json.loads(config)
    with torch.device("meta"):  # unlike accelerate's init_empty_weights for buffers too: position tables take seconds
        if library == "diffusers":
            return cls.from_config({key: value for key, value in values.items() if not key.startswith("_")})
        return cls(cls.config_class.from_dict(values))


def arguments(part: Part) -> dict[str, Any]:
    """Arguments of a diffusers network, with the defaults of its class."""
    return dict(on_meta(part).config)  # type: ignore[arg-type]


def count(part: Part) -> int:
    """Parameters of a network."""
    return part.count if part.count is not None else _count(on_meta(part))


def stored_buffers(part: Part) -> int:
    """Numbers of a network that are neither trained nor computed, such as SD3's table of positions."""
    if part.count is not None:
        return 0
    network = on_meta(part)
    stored = network.state_dict(keep_vars=True)
    return sum(value.numel() for name, value in network.named_buffers() if name in stored)


@lru_cache(maxsize=32)
def _count(network: nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


# -- published facts --------------------------------------------------------------------------------------------------


def _clip(width: int, layers: int) -> Part:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    heads = {"num_hidden_layers": layers, "num_attention_heads": width // 64}
    return Part("transformers", "CLIPTextModelWithProjection", {**sizes, **heads})


CLIP_L, CLIP_G = _clip(768, 12), _clip(1280, 32)
T5 = Part("transformers", "T5EncoderModel", count=4_762_310_656)
UMT5 = Part("transformers", "UMT5EncoderModel", count=5_680_910_336)
CLIP_H_VISION = Part("transformers", "CLIPVisionModel", count=630_766_080)
QWEN_VL = Part("transformers", "Qwen2_5_VLForConditionalGeneration", count=8_292_166_656)
KL16 = Part(
    "diffusers",
    "AutoencoderKL",
    {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
)
WAN_VAE = Part("diffusers", "AutoencoderKLWan", {"base_dim": 96, "z_dim": 16})
QWEN_VAE = Part("diffusers", "AutoencoderKLQwenImage", {"base_dim": 96, "z_dim": 16})


def _sd3(blocks: int, positions: int, **more: Any) -> dict[str, Part]:
    width = 64 * blocks  # as many heads of 64 as blocks
    network = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": blocks,
        "num_attention_heads": blocks,
        "attention_head_dim": 64,
        "caption_projection_dim": width,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": positions,
        **more,
    }
    encoders = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5}
    return {"transformer": Part("diffusers", "SD3Transformer2DModel", network), **encoders, "vae": KL16}


def _flux(guidance: bool, channels: int = 64) -> dict[str, Part]:
    network = {"guidance_embeds": guidance, "in_channels": channels, "out_channels": 64}
    encoders = {"text_encoder": CLIP_L, "text_encoder_2": T5}
    return {"transformer": Part("diffusers", "FluxTransformer2DModel", network), **encoders, "vae": KL16}


def _wan(blocks: int, heads: int, inner: int, experts: int = 1, **more: Any) -> dict[str, Part]:
    network = Part(
        "diffusers",
        "WanTransformer3DModel",
        {"num_layers": blocks, "num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": inner, **more},
    )
    both = {"transformer": network} | ({"transformer_2": network} if experts == 2 else {})
    return {**both, "text_encoder": UMT5, "vae": WAN_VAE}


_QWEN_IMAGE = {
    "transformer": Part("diffusers", "QwenImageTransformer2DModel", {"num_layers": 60, "guidance_embeds": False}),
    "text_encoder": QWEN_VL,
    "vae": QWEN_VAE,
}
_IMAGE = {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120}

KNOWN: dict[str, dict[str, Part]] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(24, 192),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(24, 384, qk_norm="rms_norm", dual_attention_layers=list(range(13))),
    "stabilityai/stable-diffusion-3.5-large": _sd3(38, 192, qk_norm="rms_norm"),
    "stabilityai/stable-diffusion-3.5-large-turbo": _sd3(38, 192, qk_norm="rms_norm"),
    "black-forest-labs/FLUX.1-dev": _flux(True),
    "black-forest-labs/FLUX.1-schnell": _flux(False),
    "black-forest-labs/FLUX.1-Kontext-dev": _flux(True),
    "black-forest-labs/FLUX.1-Fill-dev": _flux(True, 384),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(30, 12, 8960),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(40, 40, 13824),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": {**_wan(40, 40, 13824, **_IMAGE), "image_encoder": CLIP_H_VISION},
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": {**_wan(40, 40, 13824, **_IMAGE), "image_encoder": CLIP_H_VISION},
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan(40, 40, 13824, experts=2),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _wan(40, 40, 13824, experts=2, in_channels=36, out_channels=16),
    "Qwen/Qwen-Image": _QWEN_IMAGE,
    "Qwen/Qwen-Image-Edit": _QWEN_IMAGE,
    "Qwen/Qwen-Image-Edit-2509": _QWEN_IMAGE,
}
"""Hub id -> networks, so that an estimate needs neither the hub nor a download."""
