"""ImageReward's network in transformers: BLIP's vision tower, its text tower with cross attention, a linear head.

The published file has the layout of BLIP's own code (timm's blocks, MED's text tower); sizes are read from the weights,
heads are 64 wide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rewards.base import RewardError
from rewards.networks.heads import load_mlp
from rewards.networks.hub import find_model, from_pretrained, weight_file
from rewards.networks.preprocess import Preprocess
from rewards.networks.state_dicts import check_keys, counted, looks_like, read_state_dict, skeleton
from rewards.texts import writable

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the raw scores over the authors' validation set; a score is ``(raw - MEAN) / STD``."""
TOKENS = 35
WHAT = "ImageReward's weights"

_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
"""In the file, and in no path from image to score."""
_CORE = ("blip.visual_encoder.patch_embed.proj.weight", "blip.visual_encoder.pos_embed", "mlp.layers.0.weight",
         "blip.visual_encoder.blocks.0.mlp.fc1.weight", "blip.text_encoder.embeddings.word_embeddings.weight",
         "blip.text_encoder.embeddings.position_embeddings.weight",
         "blip.text_encoder.encoder.layer.0.intermediate.dense.weight")  # fmt: skip
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv",
          "attn.proj": "self_attn.projection"}  # fmt: skip


@dataclass(frozen=True)
class BlipReward:
    """Both towers, head and tokenizer."""

    vision: Any
    text: Any
    head: Any
    tokenizer: Any
    preprocess: Preprocess

    @classmethod
    def load(cls, file: str, tokenizer: str, dtype: str, device: torch.device | str) -> BlipReward:
        """Read weights and tokenizer.

        Raises:
            RewardError: not there, damaged, of another architecture, missing or unexpected weights.
        """
        words = from_pretrained(AutoTokenizer, find_model(tokenizer))
        words.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        path = weight_file(file)
        state = {key: value for key, value in read_state_dict(path).items() if not _UNUSED.fullmatch(key)}
        absent = [key for key in _CORE if key not in state]
        if absent:
            said = f"{path} is not {WHAT}: {len(absent)} weights missing ({', '.join(absent[:3])})"
            raise RewardError(f"{said}; it looks like {looks_like(state)}")
        known = len(state["blip.text_encoder.embeddings.word_embeddings.weight"])
        if len(words) > known:
            raise RewardError(f"the tokenizer {tokenizer} has {len(words)} tokens, {path} only {known}")
        vision, text, head = _networks(state, str(path), getattr(torch, dtype))
        for part in (vision, text, head):
            part.requires_grad_(False).eval().to(device)
        return cls(vision, text, head, words, Preprocess.cropped(vision.config.image_size))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """``[b, 3, H, W]`` in [0, 1] and b prompts -> ``[b]`` float32; prompts are cut to 35 tokens."""
        pixels = self.preprocess(images.to(self.vision.device)).to(self.vision.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        texts = [writable(prompt) for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        read = self.text(
            input_ids=tokens.input_ids.to(seen.device),
            attention_mask=tokens.attention_mask.to(seen.device),
            encoder_hidden_states=seen,
        )
        raw = self.head(read.last_hidden_state[:, 0].float()).squeeze(-1)
        return (raw - MEAN) / STD


def _networks(state: Mapping[str, Tensor], where: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Vision tower, text tower, head, with the weights of ``state``."""
    vision_config, text_config = _configs(state, where)
    mapped = {to_transformers(key): value for key, value in state.items()}
    expected = {
        **{f"vision.{key}": value for key, value in skeleton(lambda: BlipVisionModel(vision_config)).items()},
        **{f"text.{key}": value for key, value in skeleton(lambda: _text_model(text_config)).items()},
    }
    headless = {key: value for key, value in mapped.items() if not key.startswith("mlp.layers.")}
    check_keys(headless, expected, where, WHAT)
    parts = {
        name: {key.removeprefix(name): value for key, value in headless.items() if key.startswith(name)}
        for name in ("vision.", "text.")
    }
    vision = BlipVisionModel.from_pretrained(None, config=vision_config, state_dict=parts["vision."], dtype=dtype)
    text = BlipTextModel.from_pretrained(
        None, config=text_config, state_dict=parts["text."], dtype=dtype, add_pooling_layer=False
    )
    head = {key: value for key, value in state.items() if key.startswith("mlp.layers.")}
    return vision, text, load_mlp(head, "mlp.layers.", where, WHAT)


def _text_model(config: BlipTextConfig) -> BlipTextModel:
    return BlipTextModel(config, add_pooling_layer=False)


def _configs(state: Mapping[str, Tensor], where: str) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Sizes of both towers, from the shapes."""
    seen, read = "blip.visual_encoder.", "blip.text_encoder."
    width, _, patch, _ = state[f"{seen}patch_embed.proj.weight"].shape
    vocabulary, text_width = state[f"{read}embeddings.word_embeddings.weight"].shape
    if width % 64 or text_width % 64:
        raise RewardError(f"{where}: towers {width} and {text_width} wide do not divide into heads 64 wide")
    grid = round((state[f"{seen}pos_embed"].shape[1] - 1) ** 0.5)
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state[f"{seen}blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=counted(state, f"{seen}blocks."),
        num_attention_heads=width // 64,
        image_size=patch * grid,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=len(state[f"{read}encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=counted(state, f"{read}encoder.layer."),
        num_attention_heads=text_width // 64,
        max_position_embeddings=len(state[f"{read}embeddings.position_embeddings.weight"]),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # what gives a layer cross attention; it is still read in both directions
    )
    return vision, text


def to_transformers(key: str) -> str:
    """BLIP's name of a weight -> ``vision.`` or ``text.`` and the name in transformers; others stay as they are."""
    if key.startswith("blip.text_encoder."):
        return key.replace("blip.text_encoder.", "text.", 1)
    if not key.startswith("blip.visual_encoder."):
        return key
    key = key.removeprefix("blip.visual_encoder.")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if block:
        return f"vision.encoder.layers.{block[1]}.{_BLOCK.get(block[2], block[2])}.{block[3]}"
    if key in _VISION:
        return f"vision.{_VISION[key]}"
    stem, _, kind = key.rpartition(".")
    return f"vision.{_VISION.get(stem, stem)}.{kind}"
