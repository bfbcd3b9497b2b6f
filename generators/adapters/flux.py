"""FLUX.1 dev and schnell: ``FluxPipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from generators.base import Conditioning, Generator
from generators.codec import pack, unpack
from generators.spacing import even_sigmas, spaced

DOUBLE = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Flux(Generator):
    """Network on 2 x 2 packed latents; ``dev`` takes its guidance scale as an input, and CFG on top is "true CFG"."""

    pipeline_class = "FluxPipeline"
    splits_tokens = True
    user_attention = ("attn",)
    accepts = ("size", "text_length", "embedded_guidance", "negative_prompt")
    text_loras = ("text_encoder",)
    lora_targets = tuple(f"attn.{name}" for name in DOUBLE)
    guidance_default = 3.5

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = self.options.text_length or min(512, self.pipeline.tokenizer_2.model_max_length)
        self.check_length(prompts, self.pipeline.tokenizer_2, limit)
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=limit
        )
        return {"embeds": embeds, "pooled": pooled}

    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.latent_channels, self.size[0] // factor, self.size[1] // factor

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        tokens, ids = self.tokens(x, cond)
        out = self.network(
            hidden_states=tokens.to(self.dtype),
            timestep=t,
            guidance=self.guidance_input(t),
            encoder_hidden_states=cond.tensors["embeds"].to(self.dtype),
            pooled_projections=cond.tensors["pooled"].to(self.dtype),
            txt_ids=torch.zeros(cond.tensors["embeds"].shape[1], 3, device=x.device, dtype=self.dtype),
            img_ids=ids,
            return_dict=False,
        )[0]
        height, width = x.shape[-2:]
        return unpack(out[:, : height * width // 4], height, width)

    def tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Network input from the image: tokens ``[N, L, C]`` and their positions ``[L, 3]``."""
        return pack(x), self.positions(x)

    def positions(self, x: Tensor) -> Tensor:
        """Positions (0, row, column) of the packed latents, ``[H/2 * W/2, 3]``."""
        height, width = x.shape[-2:]
        return self.pipeline._prepare_latent_image_ids(0, height // 2, width // 2, x.device, self.dtype)

    def times(self, steps: int) -> Tensor:
        _, height, width = self.latent_shape()
        return spaced(self.pipeline.scheduler, steps, even_sigmas(steps), height * width // 4)
