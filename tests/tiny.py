"""Tiny pipelines of the real classes with random weights, built without the hub, for the tests."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers


def clip_tokenizer(pad_token: str = "<|endoftext|>", max_length: int = 77) -> Any:
    """CLIP's tokenizer without merges: a token per byte, 514 ids."""
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad_token, model_max_length=max_length)


def t5_tokenizer(max_length: int = 512) -> Any:
    """T5's tokenizer with a token per printable ASCII character."""
    from transformers import T5TokenizerFast

    chars = string.ascii_letters + string.digits
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab += [(c, -3.0) for c in chars + string.punctuation] + [("\u2581" + c, -4.0) for c in chars]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=max_length)


def clip_text_config(tokenizer: Any, hidden: int = 32) -> dict[str, Any]:
    """Settings of a two-layer CLIP text model that fits ``tokenizer``."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 37,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def clip_text_encoder(tokenizer: Any, with_projection: bool = True) -> Any:
    """CLIP text encoder of width 32."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**clip_text_config(tokenizer))
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def t5_encoder(tokenizer: Any, width: int = 64, family: str = "T5") -> Any:
    """Two-layer encoder of the ``T5`` or the ``UMT5`` family."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, f"{family}EncoderModel")(config).eval()


def language_model(name: str, tokenizer: Any, **settings: Any) -> Any:
    """Two thin layers of a decoder class of transformers, such as ``Gemma2Model``, that fits ``tokenizer``."""
    import transformers

    model = getattr(transformers, name)
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return model(model.config_class(**{**shared, **settings})).eval()


def vae(latent_channels: int = 16) -> Any:
    """Image VAE, 8 times down as the real ones, with 8-channel blocks."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()


def video_vae(name: str) -> Any:
    """VAE of videos, 8 times down and 4 times in time: ``AutoencoderKLWan`` or ``AutoencoderKLQwenImage``."""
    import diffusers

    return getattr(diffusers, name)(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def sd3_pipeline(t5: bool | str = True, seed: int = 0, **scheduler: Any) -> Any:
    """``StableDiffusion3Pipeline`` that draws 64 x 64.

    ``t5=False`` leaves T5 out, as users short of memory do; ``"null"`` fills its place with one that says nothing.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # the real SD3 pads its first tokenizer with the end token and its second with "!"
        one, two = clip_tokenizer(), clip_tokenizer(pad_token="!</w>")
        three = t5_tokenizer() if t5 else None
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            vae=vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            tokenizer=one,
            tokenizer_2=two,
            tokenizer_3=three,
            text_encoder=clip_text_encoder(one),
            text_encoder_2=clip_text_encoder(two),
            text_encoder_3=t5_encoder(three) if t5 else None,
        )
    if t5 == "null":
        torch.nn.init.zeros_(pipeline.text_encoder_3.encoder.final_layer_norm.weight)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_model(folder: Path, image_size: int = 32, seed: int = 0) -> Path:
    """Save a random ``CLIPModel`` with tokenizer and image settings into ``folder``; returns it."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        vision = {
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": 8,
        }
        config = CLIPConfig(text_config=clip_text_config(tokenizer), vision_config=vision, projection_dim=32)
        CLIPModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side).save_pretrained(folder)
    return folder
