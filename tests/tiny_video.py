"""Tiny video pipelines of the real classes with random weights, one function per family."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tiny_image import seeded


def wan_transformer(channels: int = 16, beside: int = 0, image_dim: int | None = None) -> Any:
    """Two-layer Wan network; ``beside`` channels are read and not drawn, ``image_dim`` is that of CLIP features."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels + beside,
        out_channels=channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else 24,
    ).eval()


def wan_vae(high_compression: bool = False) -> Any:
    """Wan's VAE with 4-channel blocks: 2.1's, or the 16 times smaller one of 2.2's one-expert model."""
    from diffusers import AutoencoderKLWan

    if not high_compression:
        return tiny.video_vae("AutoencoderKLWan")
    return AutoencoderKLWan(
        z_dim=48,
        decoder_base_dim=4,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=[0.02 * i - 0.4 for i in range(48)],
        latents_std=[0.5 + 0.01 * i for i in range(48)],
        base_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def wan(experts: int = 1, expand_timesteps: bool = False, high_compression: bool = False) -> Any:
    """``WanPipeline`` of 2.1, of 2.2 with two experts, or of 2.2 with times per token."""
    import diffusers

    channels = 48 if high_compression else 16

    def build() -> Any:
        tokenizer = tiny.t5_tokenizer()
        return diffusers.WanPipeline(
            transformer=wan_transformer(channels),
            transformer_2=wan_transformer(channels) if experts == 2 else None,
            boundary_ratio=0.9 if experts == 2 else None,
            expand_timesteps=expand_timesteps,
            vae=wan_vae(high_compression),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            tokenizer=tokenizer,
            text_encoder=tiny.t5_encoder(tokenizer, 32, "UMT5"),
        )

    return seeded(build)


def clip_vision() -> tuple[Any, Any]:
    """Three-layer CLIP vision model of width 32 and its image processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=16
    )
    side = {"height": 32, "width": 32}
    return CLIPVisionModel(config).eval(), CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)


def wan_i2v(experts: int = 1, first_frame: bool = False) -> Any:
    """``WanImageToVideoPipeline``: 2.1 with CLIP features, 2.2 with two experts, or 2.2 with the image as frame."""
    import diffusers

    channels, beside = (48, 0) if first_frame else (16, 20)
    image_dim = 32 if experts == 1 and not first_frame else None

    def build() -> Any:
        tokenizer = tiny.t5_tokenizer()
        encoder, processor = clip_vision() if image_dim else (None, None)
        return diffusers.WanImageToVideoPipeline(
            transformer=wan_transformer(channels, beside, image_dim),
            transformer_2=wan_transformer(channels, beside) if experts == 2 else None,
            boundary_ratio=0.9 if experts == 2 else None,
            expand_timesteps=first_frame,
            vae=wan_vae(first_frame),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            tokenizer=tokenizer,
            text_encoder=tiny.t5_encoder(tokenizer, 32, "UMT5"),
            image_encoder=encoder,
            image_processor=processor,
        )

    return seeded(build)


def ltx(told_time: bool = False) -> Any:
    """``LTXPipeline``, with the VAE of the first version or one that is told a time."""
    import diffusers

    def build() -> Any:
        tokenizer = tiny.t5_tokenizer()
        transformer = diffusers.LTXVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=64,
        )
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=16,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            decoder_inject_noise=(told_time, told_time, False, False, False),
            timestep_conditioning=told_time,
        )
        vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 16))
        vae.latents_std.copy_(torch.linspace(0.5, 2.0, 16))
        return diffusers.LTXPipeline(
            transformer=transformer.eval(),
            vae=vae.eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=1.0, use_dynamic_shifting=True, max_shift=2.05, base_shift=0.95, base_image_seq_len=16,
                max_image_seq_len=64, shift_terminal=0.1,
            ),
            tokenizer=tokenizer,
            text_encoder=tiny.t5_encoder(tokenizer),
        )  # fmt: skip

    return seeded(build)


def mochi(blank_empty: bool = False) -> Any:
    """``MochiPipeline``; ``blank_empty`` is its way with prompts that say nothing."""
    import diffusers

    def build() -> Any:
        tokenizer = tiny.t5_tokenizer()
        transformer = diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=64,
            time_embed_dim=16,
            max_sequence_length=256,
        )
        torch.nn.init.normal_(transformer.pos_frequencies)
        vae = diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        )
        return diffusers.MochiPipeline(
            transformer=transformer.eval(),
            vae=vae.eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            tokenizer=tokenizer,
            text_encoder=tiny.t5_encoder(tokenizer),
            force_zeros_for_empty_prompt=blank_empty,
        )

    return seeded(build)


def cogvideox(rotary: bool = False, frames_a_patch: int | None = None, spacing: str = "trailing") -> Any:
    """``CogVideoXPipeline`` with the deterministic scheduler: 2B, 5B (rotary) or 1.5 (two frames a patch)."""
    import diffusers

    def build() -> Any:
        tokenizer = tiny.t5_tokenizer()
        transformer = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=8,
            out_channels=8,
            time_embed_dim=8,
            text_embed_dim=64,
            num_layers=2,
            sample_width=8,
            sample_height=6,
            sample_frames=9,
            patch_size_t=frames_a_patch,
            patch_bias=frames_a_patch is None,
            max_text_seq_length=60,
            use_rotary_positional_embeddings=rotary,
        )
        vae = diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=8, layers_per_block=1, norm_num_groups=2
        )
        return diffusers.CogVideoXPipeline(
            transformer=transformer.eval(),
            vae=vae.eval(),
            scheduler=diffusers.CogVideoXDDIMScheduler(
                prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False,
                timestep_spacing=spacing, snr_shift_scale=1.0 if rotary else 3.0,
            ),
            tokenizer=tokenizer,
            text_encoder=tiny.t5_encoder(tokenizer),
        )  # fmt: skip

    return seeded(build)
