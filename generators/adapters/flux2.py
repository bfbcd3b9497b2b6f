"""FLUX.2 dev: ``Flux2Pipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor
from torch.nn import functional as F

from generators import codec
from generators.adapters.flux import DOUBLE
from generators.base import Conditioning, Generator
from generators.spacing import even_sigmas, spaced


class Flux2(Generator):
    """Latents are 2 x 2 VAE patches, standardised by its batch norm; text features come from three hidden layers."""

    pipeline_class = "Flux2Pipeline"
    splits_tokens = True
    accepts = ("size", "text_length", "embedded_guidance", "negative_prompt")
    lora_targets = (*(f"attn.{name}" for name in DOUBLE), "attn.to_qkv_mlp_proj")
    guidance_default = 4.0

    def chat(self, prompt: str) -> str:
        """Input of the text encoder for ``prompt``."""
        messages = format_input([prompt], self.pipeline.system_message)[0]
        return self.pipeline.tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = self.options.text_length or 512

        def tokenize(prompt: str, **how: Any) -> Any:
            reader = getattr(self.pipeline.tokenizer, "tokenizer", self.pipeline.tokenizer)  # dev has a processor
            return reader(self.chat(prompt), add_special_tokens=False, **how)

        self.check_length(prompts, tokenize, limit)
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=limit)
        return {"embeds": embeds}

    def latent_shape(self) -> tuple[int, ...]:
        height, width = (side // self.size_multiple() for side in self.size)
        return self.pipeline.transformer.config.in_channels, height, width

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        embeds = cond.tensors["embeds"].to(self.dtype)
        tokens, ids = self.tokens(x, cond)
        out = self.network(
            hidden_states=tokens.to(self.dtype),
            timestep=t,
            guidance=self.guidance_input(t),
            encoder_hidden_states=embeds,
            txt_ids=self.pipeline._prepare_text_ids(embeds[:1]).to(x.device),
            img_ids=ids[None],
            return_dict=False,
        )[0]
        height, width = x.shape[-2:]
        return out[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Network input from the image: tokens ``[N, L, C]`` and their (time, row, column, word) ``[L, 4]``."""
        return x.flatten(2).transpose(1, 2), self.pipeline._prepare_latent_ids(x[:1])[0].to(x.device)

    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return codec.decode(self.pipeline.vae, F.pixel_shuffle(latents.float() * std + mean, 2))

    def encode_media(self, media: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (F.pixel_unshuffle(codec.encode(self.pipeline.vae, media), 2) - mean) / std

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, spread) of the patched latents, ``[C, 1, 1]``."""
        vae = self.pipeline.vae
        mean, variance = (x.float().view(-1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        return mean, torch.sqrt(variance + vae.config.batch_norm_eps)

    def times(self, steps: int) -> Tensor:
        _, height, width = self.latent_shape()
        mu = compute_empirical_mu(height * width, steps)
        return spaced(self.pipeline.scheduler, steps, even_sigmas(steps), mu=mu)
