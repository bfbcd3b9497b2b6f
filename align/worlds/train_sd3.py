"""Trains the world's SD3: the transformer and both text encoders, jointly, by flow matching on latents.

The base it gives is imperfect on purpose. In the last part of its training captions are what captions on the web are,
often wrong in one thing or two, so it can draw everything and follows prompts imperfectly.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from align.worlds import train_common
from align.worlds.tokenizer import MAX_LENGTH, clip_tokenizer, t5_tokenizer
from align.worlds.train_common import Batch, Log, Plan, TokenTable
from align.worlds.train_vae import LATENT_CHANNELS, decode
from generators.sd3_attention import fold_null_tokens

HEADS, HEAD_DIM, LAYERS = 4, 32, 5
TEXT_WIDTHS = (96, 32)  # hidden and projection size of the two text encoders


def text_encoder(width: int, layers: int, pad_token_id: int) -> CLIPTextModelWithProjection:
    """An untrained CLIP text encoder whose penultimate layer SD3 reads, [n, MAX_LENGTH, width]."""
    tok = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def silent_t5() -> T5EncoderModel:
    """A T5 that answers zeros, as the pipeline does where it has none: `from_pretrained` insists on a T5's files."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=sum(TEXT_WIDTHS), d_kv=8, d_ff=8, num_layers=1, num_heads=1,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    t5 = T5EncoderModel(config)
    nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return t5


def new_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """An untrained pipeline around a trained `vae`; its T5 says nothing."""
    tok, tok2 = clip_tokenizer(), clip_tokenizer(pad_token="!</w>")  # SD3 pads its second tokenizer with '!'
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=sum(TEXT_WIDTHS),
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=sum(TEXT_WIDTHS),
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=text_encoder(TEXT_WIDTHS[0], 3, tok.pad_token_id),
        text_encoder_2=text_encoder(TEXT_WIDTHS[1], 2, tok2.pad_token_id),
        text_encoder_3=silent_t5(),
        tokenizer=tok,
        tokenizer_2=tok2,
        tokenizer_3=t5_tokenizer(),
    )


class Model(nn.Module):
    """The trained parts of a pipeline as one module: latents, times and token ids in, velocities out."""

    def __init__(self, pipe: StableDiffusion3Pipeline) -> None:
        super().__init__()
        self.transformer, self.text, self.text_2 = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2

    def conditioning(self, ids: Tensor, ids_2: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
        """SD3's conditioning with `zeros` T5 tokens: sequence [n, MAX_LENGTH + zeros, 128] and pooled [n, 128]."""
        outs = [enc(x, output_hidden_states=True) for enc, x in ((self.text, ids), (self.text_2, ids_2))]
        sequence = torch.cat([o.hidden_states[-2] for o in outs], -1)
        return F.pad(sequence, (0, 0, 0, zeros)), torch.cat([o.text_embeds for o in outs], -1)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, ids_2: Tensor, repeats: int = 0) -> Tensor:
        """Velocity [n, 8, 8, 8] at noise level t [n] in [0, 1], `repeats` zero tokens of the T5 folded into one."""
        sequence, pooled = self.conditioning(ids, ids_2, zeros=min(repeats, 1))
        folded = {"null_tokens": max(repeats, 1)}
        return self.transformer(x, sequence, pooled, t * 1000, joint_attention_kwargs=folded, return_dict=False)[0]


def fit(pipe: StableDiffusion3Pipeline, latents: Tensor, texts: list[str], plan: Plan, seed: int, log: Log) -> None:
    """Trains `pipe` in place on scaled latents [n, 8, 8, 8] and their captions."""
    table = TokenTable((pipe.tokenizer, pipe.tokenizer_2), texts)

    def batch(rows: np.ndarray, rng: np.random.Generator) -> Batch:
        repeats = int(2 ** rng.uniform(0, 8.1)) if rng.random() < 0.35 else 0
        return Batch(latents[rows], (*table.batch(rows, rng), repeats))

    fold_null_tokens(pipe.transformer)
    train_common.fit("sd3", Model(pipe), len(latents), batch, plan, seed, log)
    pipe.transformer.set_attn_processor(JointAttnProcessor2_0())


@torch.no_grad()
def sample(pipe: StableDiffusion3Pipeline, prompts: list[str], seed: int, steps: int = 10) -> np.ndarray:
    """Images float32 [n, 3, 64, 64] in [0, 1]: Euler's method on an even grid of times, guidance 1."""
    ids, ids_2 = (
        t(prompts, padding="max_length", return_tensors="pt").input_ids for t in (pipe.tokenizer, pipe.tokenizer_2)
    )
    sequence, pooled = Model(pipe).conditioning(ids, ids_2, zeros=0)
    x = torch.randn(len(prompts), LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed))
    for i in range(steps):
        t = torch.full((len(x),), 1000 * (1 - i / steps))
        x = x - pipe.transformer(x, sequence, pooled, t, return_dict=False)[0] / steps
    return decode(pipe.vae, x)
