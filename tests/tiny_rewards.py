"""Tiny networks in the layouts of published reward weights, written after the papers' own code and not after ours.

Their state dicts are what the reward files hold; their forward passes are what the native rewards must equal.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """open_clip's residual block, with the fused attention of torch."""

    def __init__(self, width: int, activation: Any):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 96), "c_proj": nn.Linear(96, width)})
        self.activation = activation

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    """Blocks under open_clip's name."""

    def __init__(self, width: int, layers: int, activation: Any):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, activation) for _ in range(layers)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """open_clip's vision tower."""

    def __init__(self, width: int, size: int, patch: int, features: int, activation: Any):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width) / 4)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, 2, activation)
        self.proj = nn.Parameter(torch.randn(width, features))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP as OpenAI and open_clip save it, 64 and 128 wide."""

    def __init__(self, vocabulary: int, quick_gelu: bool = False, size: int = 32):
        super().__init__()
        activation = (lambda x: x * torch.sigmoid(1.702 * x)) if quick_gelu else F.gelu
        self.visual = Visual(128, size, 8, 32, activation)
        self.transformer = Transformer(64, 3, activation)
        self.token_embedding = nn.Embedding(vocabulary, 64)
        self.positional_embedding = nn.Parameter(torch.randn(77, 64) / 4)
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.randn(64, 32))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(40.0)))

    def encode_text(self, ids: Tensor) -> Tensor:
        """``ids`` [N, 77], zeros after the end of text, which has the highest number."""
        mask = torch.full((77, 77), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[range(len(ids)), ids.argmax(-1)] @ self.text_projection

    @torch.no_grad()
    def cosine(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Of normalised ``pixels`` [N, 3, H, W] and ``ids``."""
        return F.cosine_similarity(self.visual(pixels), self.encode_text(ids))


class VisionBlock(nn.Module):
    """timm's block, as BLIP copies it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 96), "fc2": nn.Linear(96, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["proj"](attend(*self.attn["qkv"](self.norm1(x)).chunk(3, -1)))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Vision(nn.Module):
    """BLIP's vision tower."""

    def __init__(self, width: int, size: int, patch: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) / 4)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList([VisionBlock(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Attention(nn.Module):
    """BERT's attention with its output layer."""

    def __init__(self, width: int, seen: int):
        super().__init__()
        layers = {"query": nn.Linear(width, width), "key": nn.Linear(seen, width), "value": nn.Linear(seen, width)}
        self.self = nn.ModuleDict(layers)
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        found = attend(self.self["query"](x), self.self["key"](seen), self.self["value"](seen), mask)
        return self.output["LayerNorm"](self.output["dense"](found) + x)


class TextLayer(nn.Module):
    """MED's layer: self attention, attention to the image, two linear layers."""

    def __init__(self, width: int, seen: int):
        super().__init__()
        self.attention, self.crossattention = Attention(width, width), Attention(width, seen)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 96)})
        self.output = nn.ModuleDict({"dense": nn.Linear(96, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), seen)
        return self.output["LayerNorm"](self.output["dense"](F.gelu(self.intermediate["dense"](x))) + x)


class Text(nn.Module):
    """MED, BLIP's text tower."""

    def __init__(self, vocabulary: int, width: int, seen: int):
        super().__init__()
        tables = {"word_embeddings": nn.Embedding(vocabulary, width), "position_embeddings": nn.Embedding(64, width)}
        self.embeddings = nn.ModuleDict({**tables, "LayerNorm": nn.LayerNorm(width, eps=1e-12)})
        self.embeddings.register_buffer("position_ids", torch.arange(64)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([TextLayer(width, seen) for _ in range(2)])})

    def forward(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        tables = self.embeddings
        x = tables["LayerNorm"](tables["word_embeddings"](ids) + tables["position_embeddings"].weight[: ids.shape[1]])
        for layer in self.encoder["layer"]:
            x = layer(x, mask, seen)
        return x


class ImageRewardNet(nn.Module):
    """What ImageReward.pt is the state dict of."""

    def __init__(self, vocabulary: int, size: int = 32):
        super().__init__()
        self.blip = nn.ModuleDict({"visual_encoder": Vision(128, size, 8), "text_encoder": Text(vocabulary, 64, 128)})
        self.blip["vision_proj"], self.blip["text_proj"] = nn.Linear(128, 8), nn.Linear(64, 8)  # of no use here
        self.mlp = nn.ModuleDict({"layers": head(64)})

    @torch.no_grad()
    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Of normalised ``pixels`` [N, 3, H, W]."""
        seen = self.blip["visual_encoder"](pixels)
        read = self.blip["text_encoder"](ids, mask, seen)[:, 0]
        return (self.mlp["layers"](read).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of heads 64 wide; ``mask`` [N, keys] is 1 where there is a key."""
    query, key, value = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (query, key, value))
    bias = None if mask is None else torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2)


def head(width: int) -> nn.Sequential:
    """The aesthetic predictor's and ImageReward's layers, dropout among them."""
    layers = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
              nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]  # fmt: skip
    return nn.Sequential(*layers)


@torch.no_grad()
def wide(network: nn.Module, seed: int) -> Any:
    """``network`` with larger matrices, so that images and prompts differ in score."""
    draw = torch.Generator().manual_seed(seed)
    for value in network.parameters():
        if value.ndim == 2:
            value.copy_(torch.randn(value.shape, generator=draw) * 1.5 / value.shape[1] ** 0.5)
    return network.eval()


def bert_tokenizer(folder: Path) -> Any:
    """A word piece per printable ASCII character, saved into ``folder``; [DEC] and [ENC] are not yet among them."""
    from transformers import BertTokenizer

    letters = [chr(i) for i in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    made = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    made.save_pretrained(folder)
    return made
