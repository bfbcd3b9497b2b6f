"""Tiny video pipelines of the real classes with random weights, one function per family."""

from __future__ import annotations

from typing import Any

import tiny
from tiny_image import seeded


def wan_transformer() -> Any:
    """Two-layer Wan network."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()


def wan(experts: int = 1, expand_timesteps: bool = False) -> Any:
    """``WanPipeline`` of 2.1, of 2.2 with two experts, or of 2.2 with times per token."""
    import diffusers

    def build() -> Any:
        tokenizer = tiny.t5_tokenizer()
        return diffusers.WanPipeline(
            transformer=wan_transformer(),
            transformer_2=wan_transformer() if experts == 2 else None,
            boundary_ratio=0.9 if experts == 2 else None,
            expand_timesteps=expand_timesteps,
            vae=tiny.clip_vae("AutoencoderKLWan"),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            tokenizer=tokenizer,
            text_encoder=tiny.t5_encoder(tokenizer, 32, "UMT5"),
        )

    return seeded(build)
