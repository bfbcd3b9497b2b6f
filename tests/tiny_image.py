"""Tiny image pipelines of the real classes with random weights, one function per family."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin


def seeded(build: Any) -> Any:
    """Runs ``build`` under a fixed seed of its own and silences the pipeline's progress bar."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux(name: str = "FluxPipeline", guidance_embeds: bool = True, in_channels: int = 64) -> Any:
    """FLUX.1: ``FluxPipeline``, ``FluxKontextPipeline`` or, with 384 input channels, ``FluxFillPipeline``."""
    import diffusers

    def build() -> Any:
        one, two = tiny.clip_tokenizer(), tiny.t5_tokenizer()
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=in_channels,
            out_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        )
        return getattr(diffusers, name)(
            transformer=transformer.eval(),
            vae=tiny.vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
            tokenizer=one,
            tokenizer_2=two,
            text_encoder=tiny.clip_text_encoder(one, with_projection=False),
            text_encoder_2=tiny.t5_encoder(two),
        )

    return seeded(build)


def flux_fill() -> Any:
    """``FluxFillPipeline`` whose VAE answers its mean: the pipeline draws the image around the hole from it."""
    pipeline = flux("FluxFillPipeline", in_channels=384)
    out = pipeline.vae.encoder.conv_out
    half = out.weight.shape[0] // 2
    with torch.no_grad():
        out.weight[half:] = 0
        out.bias[half:] = -60.0
    return pipeline


def qwen_tokenizer(max_length: int = 1024) -> Any:
    """Qwen's tokenizer without merges: a token per byte and the special ones its pipelines use."""
    from transformers import Qwen2Tokenizer

    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=max_length)
    marks = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{mark}|>" for mark in marks]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen_vl(tokenizer: Any, width: int = 32) -> Any:
    """Two-layer Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": ids("<|im_end|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": width,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


class ImageOnlyProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its part for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen_image(name: str = "QwenImagePipeline", zero_cond_t: bool = False) -> Any:
    """``QwenImagePipeline``, or an editor: ``QwenImageEditPipeline``, ``QwenImageEditPlusPipeline``."""
    import diffusers

    def build() -> Any:
        tokenizer = qwen_tokenizer()
        transformer = diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 4, 4),
            zero_cond_t=zero_cond_t,
        )
        pixels = {"shortest_edge": 28 * 28, "longest_edge": 4 * 56 * 56}
        images = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=pixels)
        editor = {"processor": ImageOnlyProcessor(images, tokenizer)} if "Edit" in name else {}
        return getattr(diffusers, name)(
            transformer=transformer.eval(),
            vae=tiny.video_vae("AutoencoderKLQwenImage"),
            tokenizer=tokenizer,
            text_encoder=qwen_vl(tokenizer),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
            **editor,
        )

    return seeded(build)


def z_image() -> Any:
    """``ZImagePipeline``."""
    import diffusers

    def build() -> Any:
        tokenizer = qwen_tokenizer()
        transformer = diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            norm_eps=1e-5,
            qk_norm=True,
            cap_feat_dim=32,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
        for name, value in transformer.named_parameters():
            if name.endswith("pad_token"):  # left as it lies in memory by the class
                torch.nn.init.zeros_(value)
        return diffusers.ZImagePipeline(
            transformer=transformer.eval(),
            vae=tiny.vae(),
            tokenizer=tokenizer,
            text_encoder=tiny.language_model("Qwen3Model", tokenizer, head_dim=8, max_position_embeddings=1024),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        )

    return seeded(build)
