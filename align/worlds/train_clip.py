"""Trains the world's `CLIPModel`, a learned proxy reward that reads images and captions imperfectly."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from align.worlds.tokenizer import MAX_LENGTH, clip_tokenizer
from align.worlds.train_common import Log, cosine, optimizer
from alignflow.worlds.shapes import world


def new_clip() -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained model of about 1 M parameters (64x64 images in 8x8 patches) and its processor."""
    tok = clip_tokenizer()
    text = {
        "vocab_size": len(tok), "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": MAX_LENGTH, "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 112, "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 64, "patch_size": 8,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))
    size = {"height": 64, "width": 64}
    return model, CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=size), tok)


def contrastive_loss(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss over logits [n, 2n]: images against their captions, then captions with one change.

    `same` [n, n] marks equal captions, which are not negatives of each other.
    """
    n = len(logits)
    target = torch.arange(n)
    twins = same & ~torch.eye(n, dtype=torch.bool)
    square = logits[:, :n].masked_fill(twins, -1e4)
    return (F.cross_entropy(torch.cat([square, logits[:, n:]], 1), target) + F.cross_entropy(square.T, target)) / 2


def augment(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Blur and noise of a random strength, as a generator's images have; [n, 3, h, w] in [0, 1]."""
    soft = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    strength = torch.from_numpy(rng.random((len(pixels), 1, 1, 1), np.float32))
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32))
    return pixels + 0.8 * strength * (soft - pixels) + 0.05 * strength * noise


def features(model: CLIPModel, pixels: torch.Tensor | None, ids: torch.Tensor | None) -> torch.Tensor:
    """Unit rows [n, 96] of images or of captions."""
    out = model.get_image_features(pixels) if ids is None else model.get_text_features(ids)
    return F.normalize(out.pooler_output, dim=-1)


def train_clip(n: int, steps: int, batch: int, seed: int, log: Log) -> tuple[CLIPModel, CLIPProcessor]:
    """Trains on `n` scenes, each beside one caption with one thing changed."""
    torch.manual_seed(seed)
    model, processor = new_clip()
    rng = np.random.default_rng(seed)
    specs = world.sample_specs("train", n, seed)
    images = np.stack([world.render(world.sample_scene(s, rng)) for s in specs])
    mean, std = (torch.tensor(getattr(processor.image_processor, k)).view(3, 1, 1) for k in ("image_mean", "image_std"))
    opt = optimizer(model.parameters(), lr=1e-3)
    for step in range(steps):
        pick = rng.integers(0, n, batch)
        texts = [world.caption(specs[i]) for i in pick] + [world.caption(world.corrupt(specs[i], rng)) for i in pick]
        ids = processor.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        x = torch.from_numpy(images[pick]).permute(0, 3, 1, 2).float() / 255
        image, text = features(model, (augment(x, rng) - mean) / std, None), features(model, None, ids)
        same = (ids[:batch, None] == ids[None, :batch]).all(-1)
        loss = contrastive_loss(model.logit_scale.exp().clamp(max=100) * image @ text.T, same)
        cosine(opt, step, steps, warmup=100)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        log("clip", step, steps, loss=loss.item())
    return model.eval(), processor
