"""State dicts in the layout of OpenAI's clip and open_clip -> ``CLIPModel`` of transformers.

Sizes are read from the weights. Heads are not in them: they are 64 wide, but for open_clip's largest towers. Nor is the
activation: OpenAI's weights have QuickGELU, LAION's GELU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from rewards.base import RewardError
from rewards.networks.state_dicts import check_keys, counted, looks_like, skeleton

WHAT = "CLIP in the layout of open_clip"
HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
"""Width of a vision tower -> width of its heads, where it is not 64: ViT-H, ViT-g, ViT-bigG, ViT-e."""

_CORE = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "text_projection", "logit_scale",
         "positional_embedding", "token_embedding.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight",
         "transformer.resblocks.0.mlp.c_fc.weight")  # fmt: skip
_SCALARS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's archives keep these beside the weights

_TOP = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelt this way in transformers
    "visual.ln_post": "vision_model.post_layernorm",
}
_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
          "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
_TRANSPOSED = ("text_projection", "visual.proj")  # multiplied from the right there, a Linear here


def build(state: Mapping[str, Tensor], where: str, eos_token_id: int, quick_gelu: bool, dtype: object) -> CLIPModel:
    """``CLIPModel`` with the weights of ``state``.

    Args:
        where: the file, for messages.
        eos_token_id: the tokenizer's end of text, whose place is where the text is read off.

    Raises:
        RewardError: missing or unexpected keys, or another architecture.
    """
    state = {key: value for key, value in state.items() if key not in _SCALARS}
    absent = [key for key in _CORE if key not in state]
    if absent:
        said = f"{where} is not {WHAT}: {len(absent)} weights missing ({', '.join(absent[:3])})"
        raise RewardError(f"{said}; it looks like {looks_like(state)}")
    config = config_of(state, where, eos_token_id, "quick_gelu" if quick_gelu else "gelu")
    mapped = to_transformers(state)
    check_keys(mapped, skeleton(lambda: CLIPModel(config)), where, WHAT)
    return CLIPModel.from_pretrained(None, config=config, state_dict=mapped, dtype=dtype)


def config_of(state: Mapping[str, Tensor], where: str, eos_token_id: int, activation: str) -> CLIPConfig:
    """Sizes of both towers, from the shapes."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    vocabulary, text_width = state["token_embedding.weight"].shape
    head = HEAD_WIDTH.get(width, 64)
    if width % head or text_width % 64:
        raise RewardError(f"{where}: towers {width} and {text_width} wide do not divide into heads {head} and 64 wide")
    vision = {
        "hidden_size": width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": counted(state, "visual.transformer.resblocks."),
        "num_attention_heads": width // head,
        "patch_size": patch,
        "image_size": patch * grid,
        "hidden_act": activation,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": counted(state, "transformer.resblocks."),
        "num_attention_heads": text_width // 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": len(state["positional_embedding"]),
        "eos_token_id": eos_token_id,
        "hidden_act": activation,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["text_projection"].shape[1])


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renamed, fused query-key-value split; keys that have no counterpart keep their name."""
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", key)
        norm, _, kind = key.rpartition(".")
        if key in _TOP:
            mapped[_TOP[key]] = value.T.contiguous() if key in _TRANSPOSED else value
        elif norm in _NORMS:
            mapped[f"{_NORMS[norm]}.{kind}"] = value
        elif block and block[3] == "attn.in_proj" and len(value) % 3 == 0:
            place = f"{_tower(block[1])}.encoder.layers.{block[2]}.self_attn"
            for name, part in zip("qkv", value.chunk(3), strict=True):
                mapped[f"{place}.{name}_proj.{block[4]}"] = part
        elif block and block[3] in _BLOCK:
            mapped[f"{_tower(block[1])}.encoder.layers.{block[2]}.{_BLOCK[block[3]]}.{block[4]}"] = value
        else:
            mapped[key] = value
    return mapped


def _tower(prefix: str | None) -> str:
    return "vision_model" if prefix else "text_model"
