"""Trains the world's judge, a `Qwen3VLForConditionalGeneration` that answers the rewards' questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from align.worlds.judge_data import KINDS, Asked, Pairs, draw_pairs, vocabulary
from align.worlds.tokenizer import qwen_tokenizer
from align.worlds.train_clip import augment
from align.worlds.train_common import Log, Losses, Plan, minimise
from align.worlds.train_vae import decode, encode
from alignflow.worlds.shapes import world
from rewards.judges.local import LocalJudge
from rewards.judges.models import Local
from rewards.judges.pixels import Patches

CELL = 16  # pixels a side of what becomes one token
FEATURES = ((*world.SHAPES, ""), (*world.COLOURS, ""), (*world.SIZES, ""), tuple(world.BACKGROUNDS))
PASSED = 0.5  # share of the scenes that have passed the autoencoder, with noise on their latents
WATCH = 1.0  # weight of the words' loss beside that of the reply


def new_judge() -> tuple[LocalJudge, Qwen2VLImageProcessorPil]:
    """An untrained judge of about 2 M parameters (64x64 images in 8x8 patches, 16 tokens), its image settings."""
    tokens = qwen_tokenizer(vocabulary())
    ids = {
        name.removesuffix("_pad"): tokens.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    vision = {
        "depth": 4, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "patch_size": 8,
        "spatial_merge_size": CELL // 8, "temporal_patch_size": 1, "out_hidden_size": 128,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [],
    }  # fmt: skip
    text = {
        "vocab_size": len(tokens), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [6, 5, 5]},
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, **{f"{name}_token_id": number for name, number in ids.items()}
    )
    config._attn_implementation = "sdpa"
    pixels = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=CELL // 8, temporal_patch_size=1, size={"shortest_edge": 64**2, "longest_edge": 64**2}
    )
    model = Qwen3VLForConditionalGeneration(config)
    return LocalJudge(Local(model="shapes"), model, tokens, Patches.of_processor(pixels)), pixels


class Pupil(nn.Module):
    """A judge that learns, with two readouts that are thrown away: what a cell shows, and which words hold."""

    def __init__(self, judge: LocalJudge) -> None:
        super().__init__()
        self.judge, self.model = judge, judge.model
        self.model.set_attn_implementation("eager")  # on a CPU its backward pass takes half the time
        width = self.model.config.text_config.hidden_size
        self.cells = nn.Linear(width, sum(map(len, FEATURES)))
        self.words = nn.Linear(width, 2)
        self.quote = judge.tokenizer.convert_tokens_to_ids('Ġ"')

    def see(self, images: Tensor) -> tuple[Any, Tensor]:
        """Features of images [P, 3, 64, 64] in [0, 1], and their grids [P, 3]."""
        patches, grids = self.judge.patches(list(images))
        return self.model.model.get_image_features(patches, grids, return_dict=True), grids

    def cell_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of what every cell shows, `labels` int64 [P, cells, len(FEATURES)]."""
        seen = torch.cat(self.see(images)[0].pooler_output)
        parts = self.cells(seen).split([len(names) for names in FEATURES], -1)
        return torch.stack([F.cross_entropy(x, y) for x, y in zip(parts, labels.flatten(0, 1).T, strict=True)]).mean()

    def reply_loss(self, images: Tensor, asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the replies, and that of the words (`Asked.words`).

        As many questions in a row show the same images: those are looked at once, and what the language model
        makes of them is kept for all of these questions. Rows are padded behind, where a causal model does not look.
        """
        each = sum(one.images == asked[0].images for one in asked)
        rows = [self.judge.tokens(one.question) for one in asked]
        start = max(i for i, token in enumerate(rows[0]) if token == self.judge.image_token) + 1
        past, at = self._shown(images, [row[:start] for row in rows[::each]], asked[::each])
        past.batch_repeat_interleave(each)
        replies = [self.judge.encode(one.reply) if isinstance(one.reply, str) else [] for one in asked]
        texts = [row[start:] + reply for row, reply in zip(rows, replies, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, texts)), batch_first=True)
        positions = (at + torch.arange(ids.shape[1])).expand(3, len(ids), -1)
        hidden = self.model.model(input_ids=ids, position_ids=positions, past_key_values=past).last_hidden_state
        wanted = [self._wanted(reply, one) for reply, one in zip(replies, asked, strict=True)]
        ends = [(i, len(row) - start - 1 + k) for i, row in enumerate(rows) for k in range(len(wanted[i]))]
        logs = self.model.lm_head(_at(hidden, ends)).float().log_softmax(-1)
        return -(torch.cat(wanted) * logs).sum(-1).mean(), self._word_loss(hidden, texts, asked)

    def _shown(self, images: Tensor, rows: list[list[int]], asked: Sequence[Asked]) -> tuple[Any, int]:
        """The language model's cache for the beginnings `rows`, which end with images, and the next position."""
        seen, grids = self.see(images)
        order = [i for one in asked for i in one.images]
        seen.pooler_output = [seen.pooler_output[i] for i in order]
        ids = torch.tensor(rows)
        kinds = (ids == self.judge.image_token).int()
        positions, behind = self.model.model.get_rope_index(ids, kinds, grids[order])
        kept = self.model.model(
            input_ids=ids, position_ids=positions, mm_encoder_outputs={"image": seen}, use_cache=True
        )
        return kept.past_key_values, ids.shape[1] + int(behind[0])

    def _wanted(self, reply: list[int], one: Asked) -> Tensor:
        """Target probabilities at every position of a reply, [places, V]."""
        size = self.model.config.text_config.vocab_size
        if isinstance(one.reply, str):
            return F.one_hot(torch.tensor(reply), size).float()
        wanted = torch.zeros(1, size)
        for text, share in one.reply.items():
            (token,) = self.judge.encode(text)
            wanted[0, token] = share
        return wanted

    def _word_loss(self, hidden: Tensor, texts: list[list[int]], asked: Sequence[Asked]) -> Tensor:
        """Cross-entropy of `Asked.words`; a word is a token, the first is behind the quote."""
        begin = [text.index(self.quote) + 1 if one.words else 0 for text, one in zip(texts, asked, strict=True)]
        at = [(i, begin[i] + k) for i, one in enumerate(asked) for k in range(len(one.words))]
        if not at:
            return hidden.new_zeros(())
        wanted = torch.tensor([pair for one in asked for pair in one.words])
        logits, known = self.words(_at(hidden, at)).float(), wanted.isfinite()
        return F.binary_cross_entropy_with_logits(logits[known], wanted[known])


def _at(hidden: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """Rows of `hidden` [Q, L, D] at places (question, position)."""
    at = torch.tensor(places)
    return hidden[at[:, 0], at[:, 1]]


def cell_labels(scene: world.Scene) -> np.ndarray:
    """Content of each cell, int64 [cells, len(FEATURES)]: the object that covers most of it, and the background."""
    edges = np.arange(0, world.CANVAS + 1, CELL)
    side = len(edges) - 1
    labels = np.full((side, side, len(FEATURES)), [len(names) - 1 for names in FEATURES])
    labels[..., -1] = FEATURES[-1].index(scene.background)
    most = np.full((side, side), 8.0)  # canvas units squared; less is not to be seen
    for o in scene.objects:
        x, y = (
            np.clip(np.minimum(o.box[k + 2], edges[1:]) - np.maximum(o.box[k], edges[:-1]), 0, None) for k in (0, 1)
        )
        cover = y[:, None] * x
        here = cover > most
        labels[here, :3] = [names.index(v) for names, v in zip(FEATURES, (o.shape, o.colour, o.size), strict=False)]
        most = np.maximum(most, cover)
    return labels.reshape(side * side, -1)


def passed_through(vae: Any, images: np.ndarray, rng: np.random.Generator, batch: int = 64) -> np.ndarray:
    """uint8 images [n, 64, 64, 3] after the autoencoder, with noise of a random strength on their latents."""
    parts = []
    for start in range(0, len(images), batch):
        latents = encode(vae, images[start : start + batch])
        strength = torch.from_numpy(rng.random((len(latents), 1, 1, 1), np.float32))
        noisy = latents + 0.5 * strength * torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        parts.append(np.round(decode(vae, noisy) * 255).astype(np.uint8).transpose(0, 2, 3, 1))
    return np.concatenate(parts)


def lessons(vae: AutoencoderKL, scenes: int, seed: int) -> Pairs:
    """Pairs of training scenes, a share PASSED of which has passed `vae`."""
    pairs = draw_pairs("train", scenes // 2, seed)
    rng = np.random.default_rng([seed, 3])
    some = np.flatnonzero(rng.random(len(pairs.images)) < PASSED)
    pairs.images[some] = passed_through(vae, pairs.images[some], rng)
    return pairs


def shown(pairs: Pairs, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Images [P, 3, 64, 64] in [0, 1], blurred and noisy."""
    return augment(torch.from_numpy(pairs.images[rows]).permute(0, 3, 1, 2).float() / 255, rng).clamp(0, 1)


def look(pupil: Pupil, pairs: Pairs, plan: Plan, seed: int, log: Log) -> None:
    """Trains to see what cells show."""
    labels = torch.from_numpy(np.stack([cell_labels(scene) for scene in pairs.scenes]))

    @torch.autocast("cpu", torch.bfloat16)
    def losses(rng: np.random.Generator) -> Losses:
        rows = rng.integers(0, len(pairs.images), plan.batch)
        return {"cells": pupil.cell_loss(shown(pairs, rows, rng), labels[rows])}

    minimise("judge looks", pupil, losses, plan, seed, log)


def read(pupil: Pupil, pairs: Pairs, plan: Plan, seed: int, log: Log) -> None:
    """Trains to answer; a step asks one kind of question."""

    @torch.autocast("cpu", torch.bfloat16)
    def losses(rng: np.random.Generator) -> Losses:
        rows = pairs.draw(plan.batch // 2, rng)
        media = shown(pairs, rows, rng)
        kind = list(KINDS)[rng.choice(len(KINDS), p=list(KINDS.values()))]
        reply, words = pupil.reply_loss(media, kind(pairs, rows, media, rng))
        return {kind.__name__: reply, "words": WATCH * words}

    minimise("judge reads", pupil, losses, plan, seed, log)


def train_judge(
    vae: AutoencoderKL, looking: Plan, *reading: Plan, seed: int, log: Log
) -> tuple[LocalJudge, Qwen2VLImageProcessorPil]:
    """Trains to look, then to answer, every plan on scenes of its own."""
    torch.manual_seed(seed)
    judge, pixels = new_judge()
    pupil = Pupil(judge)
    look(pupil, lessons(vae, looking.scenes, seed), looking, seed, log)
    for later, plan in enumerate(reading, 1):
        read(pupil, lessons(vae, plan.scenes, seed + later), plan, seed + later, log)
    return judge, pixels
