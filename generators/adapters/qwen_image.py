"""Qwen-Image: ``QwenImagePipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from generators import codec
from generators.adapters.flux import DOUBLE
from generators.base import Conditioning, Generator
from generators.codec import pack, unpack
from generators.spacing import even_sigmas, spaced


class QwenImage(Generator):
    """Network on 2 x 2 packed latents of a video VAE's single frame; guidance keeps the conditional velocity's norm."""

    pipeline_class = "QwenImagePipeline"
    user_attention = ("attn",)
    accepts: tuple[str, ...] = ("size", "text_length", "embedded_guidance", "negative_prompt")
    lora_targets = tuple(f"attn.{name}" for name in DOUBLE)

    def idle(self) -> tuple[str, ...]:
        """The text stream of the last block: only keys and values of it reach the image."""
        last = f"transformer_blocks.{len(self.pipeline.transformer.transformer_blocks) - 1}"
        return f"{last}.attn.add_q_proj", f"{last}.attn.to_add_out", f"{last}.txt_mlp"

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = self.options.text_length or 512
        self.check_length(prompts, self.pipeline.tokenizer, limit)
        embeds, mask = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=limit)
        return {"embeds": embeds, "mask": whole(embeds) if mask is None else mask.bool()}

    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.vae.config.z_dim, self.size[0] // factor, self.size[1] // factor

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        tokens, shapes = self.tokens(x, cond)
        mask = cond.tensors["mask"]
        out = self.network(
            hidden_states=tokens.to(self.dtype),
            timestep=t,
            guidance=self.guidance_input(t),
            encoder_hidden_states=cond.tensors["embeds"].to(self.dtype),
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )[0]
        return unpack(out[:, : height * width // 4], height, width)

    def tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Network input from the image: tokens ``[N, L, C]`` and the (frame, row, column) counts they fill."""
        height, width = x.shape[-2:]
        return pack(x), [(1, height // 2, width // 2)]

    def guide(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance whose every token keeps the norm of the conditional one."""
        height, width = conditional.shape[-2:]
        guided = pack(super().guide(unconditional, conditional, guidance))
        scale = pack(conditional).norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * scale, height, width)

    def decode(self, latents: Tensor) -> Tensor:
        return codec.decode(self.pipeline.vae, latents.unsqueeze(2))[:, 0]

    def encode_media(self, media: Tensor) -> Tensor:
        return codec.encode(self.pipeline.vae, media.unsqueeze(1)).squeeze(2)

    def times(self, steps: int) -> Tensor:
        _, height, width = self.latent_shape()
        return spaced(self.pipeline.scheduler, steps, even_sigmas(steps), height * width // 4)


def whole(embeds: Tensor) -> Tensor:
    """The mask of texts ``[B, L, D]`` that are all of one length: True ``[B, L]``."""
    return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
