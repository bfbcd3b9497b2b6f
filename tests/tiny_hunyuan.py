"""Tiny HunyuanVideo pipelines of the real classes with random weights."""

from __future__ import annotations

from typing import Any

import tiny
from tiny_image import qwen_tokenizer, seeded


def llama_tokenizer() -> Any:
    """A tokenizer that cuts HunyuanVideo's template into about as many pieces as Llama's, and other texts into bytes.

    The pipeline throws the template's first 95 tokens away, so neither bytes nor a token for all of it would do.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([DEFAULT_PROMPT_TEMPLATE["template"]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=512)


def llama(tokenizer: Any) -> Any:
    """Three-layer Llama; the pipeline skips the last two."""
    settings = {"intermediate_size": 37, "num_hidden_layers": 3, "max_position_embeddings": 512}
    return tiny.language_model("LlamaModel", tokenizer, pad_token_id=tokenizer.pad_token_id, **settings)


def hunyuan_video(guidance_embeds: bool = True) -> Any:
    """``HunyuanVideoPipeline``."""
    import diffusers

    def build() -> Any:
        one, two = llama_tokenizer(), tiny.clip_tokenizer()
        transformer = diffusers.HunyuanVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            guidance_embeds=guidance_embeds,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(4, 6, 6),
        )
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
        return diffusers.HunyuanVideoPipeline(
            transformer=transformer.eval(),
            vae=vae.eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            tokenizer=one,
            tokenizer_2=two,
            text_encoder=llama(one),
            text_encoder_2=tiny.clip_text_encoder(two, with_projection=False),
        )

    return seeded(build)


def qwen_text(tokenizer: Any) -> Any:
    """Three-layer text part of Qwen2.5-VL; the pipeline skips the last two."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    settings = {"intermediate_size": 37, "num_hidden_layers": 3, "rope_parameters": rope}
    return tiny.language_model("Qwen2_5_VLTextModel", tokenizer, **settings)


def hunyuan_video15(guidance: float = 1.0, rescale: float = 0.0) -> Any:
    """``HunyuanVideo15Pipeline`` whose guider says ``guidance``; fewer padding tokens than the real one's 2000."""
    import diffusers
    from transformers import ByT5Tokenizer

    def build() -> Any:
        one, two = qwen_tokenizer(2048), ByT5Tokenizer()
        transformer = diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=17,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=64,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            task_type="t2v",
        )
        vae = diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=8, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1
        )
        pipeline = diffusers.HunyuanVideo15Pipeline(
            transformer=transformer.eval(),
            vae=vae.eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
            tokenizer=one,
            tokenizer_2=two,
            text_encoder=qwen_text(one),
            text_encoder_2=tiny.t5_encoder(two),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=guidance, guidance_rescale=rescale),
        )
        pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 620, 40
        pipeline.vision_num_semantic_tokens = 4
        return pipeline

    return seeded(build)
