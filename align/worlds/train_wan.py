"""Trains the world's Wan: the transformer and its text encoder, jointly, by flow matching on video latents.

Unlike those of `train_sd3` its captions stay true: the base follows prompts imperfectly as it is, and a last part with
wrong ones took it from 0.64 to 0.2 and less.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from align.worlds import train_common
from align.worlds.tokenizer import t5_tokenizer
from align.worlds.train_common import Batch, Log, Plan, TokenTable
from align.worlds.train_vae import LATENT_CHANNELS, decode
from alignflow.worlds.shapes import motion

HEADS, HEAD_DIM, LAYERS = 4, 32, 4
TEXT_WIDTH = 64
TEXT_LENGTH = 16  # 'a video of three red circles are thrown to the left on a gray background' has 15 words
LATENT_SHAPE = (LATENT_CHANNELS, (motion.FRAMES - 1) // 2 + 1, motion.SIZE // 4, motion.SIZE // 4)
MOST_TOKENS = 512  # that the pipeline pads a text to


class FoldedCrossAttention(WanAttnProcessor):
    """Wan's attention in which the last text token may stand for many equal ones, exactly; see `sd3_attention`.

    The pipeline appends zeros to every text, up to 512, and nothing masks them.
    """

    null_tokens = 1

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Self-attention as ever; in cross-attention the last key counts `null_tokens` times."""
        if encoder_hidden_states is None or self.null_tokens == 1:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        bias = hidden_states.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
        bias[..., -1] = math.log(self.null_tokens)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias)


def new_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """An untrained pipeline around a trained `vae`."""
    tokenizer = t5_tokenizer(motion.words(), TEXT_LENGTH)
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=16, d_ff=2 * TEXT_WIDTH, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=3 * HEADS * HEAD_DIM,
        num_layers=LAYERS,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
    )


class Model(nn.Module):
    """The trained parts of a pipeline as one module: latents, times and token ids in, velocities out."""

    def __init__(self, pipe: WanPipeline) -> None:
        super().__init__()
        self.transformer, self.text = pipe.transformer, pipe.text_encoder
        self.attention = FoldedCrossAttention()
        self.transformer.set_attn_processor(self.attention)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, null_tokens: int = 1) -> Tensor:
        """Velocity [n, 8, 5, 8, 8] at noise level t [n] in [0, 1]; the last token of `ids` [n, 16] stands for many."""
        mask = (ids != 0).long()
        text = self.text(ids, mask).last_hidden_state * mask[..., None]
        self.attention.null_tokens = null_tokens
        return self.transformer(x, t * 1000, text, return_dict=False)[0]


def fit(pipe: WanPipeline, latents: Tensor, texts: list[str], plan: Plan, seed: int, log: Log) -> None:
    """Trains `pipe` in place on scaled latents [n, 8, 5, 8, 8] and their captions."""
    table = TokenTable((pipe.tokenizer,), texts)

    def batch(rows: np.ndarray, rng: np.random.Generator) -> Batch:
        null_tokens = int(2 ** rng.uniform(0, math.log2(MOST_TOKENS))) if rng.random() < 0.35 else 1
        return Batch(latents[rows], (*table.batch(rows, rng), null_tokens))

    train_common.fit("wan", Model(pipe), len(latents), batch, plan, seed, log)
    pipe.transformer.set_attn_processor(WanAttnProcessor())


@torch.no_grad()
def sample(pipe: WanPipeline, prompts: list[str], seed: int, steps: int = 10) -> np.ndarray:
    """Videos float32 [n, 9, 3, 32, 32] in [0, 1]: Euler's method on an even grid of times, guidance 1."""
    model, ids = Model(pipe).eval(), TokenTable((pipe.tokenizer,), prompts).ids[0]
    x = torch.randn(len(prompts), *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))
    for i in range(steps):
        x = x - model(x, torch.full((len(x),), 1 - i / steps), ids) / steps
    return decode(pipe.vae, x)
