"""Tiny FLUX.2 pipelines of the real classes with random weights."""

from __future__ import annotations

from typing import Any

import tiny
from tiny_image import qwen_tokenizer, seeded
from transformers.processing_utils import ProcessorMixin

# long enough for the layers that the pipelines read by default
MISTRAL_LAYERS, QWEN_LAYERS = 30, 27
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
}
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "[/{{ m['role'] }}]{% endfor %}"
)


def vae() -> Any:
    """``AutoencoderKLFlux2`` whose batch norm has seen something."""
    from diffusers import AutoencoderKLFlux2

    coder = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64
    )
    coder.bn.running_mean.uniform_(-0.5, 0.5)
    coder.bn.running_var.uniform_(0.5, 2.0)
    return coder.eval()


def transformer(guidance_embeds: bool) -> Any:
    """One block of either kind."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT["hidden_size"],
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()


def mistral(tokenizer: Any) -> Any:
    """Mistral3 of 30 thin layers."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {"model_type": "mistral", "vocab_size": len(tokenizer), "num_hidden_layers": MISTRAL_LAYERS, **TEXT}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=len(tokenizer) - 1)
    return Mistral3ForConditionalGeneration(config).eval()


class TextProcessor(ProcessorMixin):
    """What ``Flux2Pipeline`` asks of Pixtral's processor, whose part for images needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    def __init__(self, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


def dev(processor: bool = False) -> Any:
    """``Flux2Pipeline`` that reads its text with a processor, as the real one, or with a bare tokenizer."""
    import diffusers

    def build() -> Any:
        tokenizer = qwen_tokenizer()
        tokenizer.chat_template = CHAT
        return diffusers.Flux2Pipeline(
            transformer=transformer(True),
            vae=vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            tokenizer=TextProcessor(tokenizer, CHAT) if processor else tokenizer,
            text_encoder=mistral(tokenizer),
        )

    return seeded(build)


def klein(distilled: bool = False) -> Any:
    """``Flux2KleinPipeline``."""
    import diffusers

    def build() -> Any:
        tokenizer = qwen_tokenizer()
        return diffusers.Flux2KleinPipeline(
            transformer=transformer(False),
            vae=vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            tokenizer=tokenizer,
            text_encoder=tiny.language_model("Qwen3ForCausalLM", tokenizer, num_hidden_layers=QWEN_LAYERS, **TEXT),
            is_distilled=distilled,
        )

    return seeded(build)
