"""Tiny Sana pipelines of the real classes with random weights."""

from __future__ import annotations

import string
from typing import Any

import tiny
from tiny_image import seeded


def gemma_tokenizer(max_length: int = 2048) -> Any:
    """Gemma's tokenizer with a token per printable ASCII character; a text begins with its own mark."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", "\n"]
    pieces += string.ascii_letters + string.digits + string.punctuation
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[], model_max_length=max_length)
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    return tokenizer


def gemma(tokenizer: Any) -> Any:
    """Two-layer Gemma 2."""
    marks = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return tiny.language_model("Gemma2Model", tokenizer, intermediate_size=32, **heads, **marks)


def vae() -> Any:
    """``AutoencoderDC``, 8 times down."""
    from diffusers import AutoencoderDC

    widths = (8, 8, 16, 16)
    blocks, scales = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"), ((), (), (5,), (5,))
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()


def transformer(**settings: Any) -> Any:
    """Two-layer Sana network."""
    from diffusers import SanaTransformer2DModel

    common = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 32,
        "sample_size": 8,
    }
    return SanaTransformer2DModel(**{**common, **settings}).eval()


def sana(solver: str = "DPMSolverMultistepScheduler", **network: Any) -> Any:
    """``SanaPipeline`` with the scheduler of its released folders or another."""
    import diffusers

    dpm = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    settings = {"DPMSolverMultistepScheduler": dpm, "FlowMatchEulerDiscreteScheduler": {"shift": 3.0}}[solver]

    def build() -> Any:
        tokenizer = gemma_tokenizer()
        return diffusers.SanaPipeline(
            transformer=transformer(**network),
            vae=vae(),
            scheduler=getattr(diffusers, solver)(**settings),
            tokenizer=tokenizer,
            text_encoder=gemma(tokenizer),
        )

    return seeded(build)


def sprint() -> Any:
    """``SanaSprintPipeline``."""
    import diffusers

    def build() -> Any:
        tokenizer = gemma_tokenizer()
        return diffusers.SanaSprintPipeline(
            transformer=transformer(guidance_embeds=True, guidance_embeds_scale=0.1),
            vae=vae(),
            scheduler=diffusers.SCMScheduler(),
            tokenizer=tokenizer,
            text_encoder=gemma(tokenizer),
        )

    return seeded(build)
