"""Stable Diffusion 3 and 3.5: ``StableDiffusion3Pipeline``, with or without its T5 encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from generators.base import Conditioning, Generator, GeneratorError, in_chunks
from generators.sd3_attention import fold_null_tokens

VAE_PIXELS = 2**22  # coded at once: four images of a megapixel
VAE_PIXELS_CPU = 2**16  # what fits its cache: 16 images of 64 x 64, twice as fast as 192 at once


class SD3(Generator):
    """MMDiT that predicts ``eps - x0`` at ``timestep = 1000 t``: the convention of :mod:`generators.base` as it is."""

    pipeline_class = "StableDiffusion3Pipeline"
    optional = ("text_encoder_3", "tokenizer_3")
    lora_targets = tuple(
        f"attn.{name}"
        for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
    )

    def __init__(self, pipeline: Any, size: tuple[int, int] | None = None) -> None:
        super().__init__(pipeline, size)
        t5 = pipeline.text_encoder_3  # a final norm of zero makes it a placeholder: its tokens are zeros
        self.has_t5 = t5 is not None and bool(t5.encoder.final_layer_norm.weight.any())
        if not self.has_t5:
            fold_null_tokens(self.backbone)
        pipeline.vae.to(memory_format=torch.channels_last)  # convolutions run up to twice as fast

    def native_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def check_size(self) -> None:
        config = self.pipeline.transformer.config
        patch = self.pipeline.vae_scale_factor * config.patch_size
        largest = patch * config.pos_embed_max_size
        if any(side < patch or side % patch or side > largest for side in self.size):
            raise GeneratorError(f"size {self.size}: height and width must be multiples of {patch}, at most {largest}")

    @property
    def text_length(self) -> int:
        """T5's share of the text tokens: the pipeline's default ``max_sequence_length``, or its tokenizer's if shorter.

        Without T5 the pipeline puts as many zeros there and the network attends to them; here one stands for all.
        """
        return min(256, self.pipeline.tokenizer_3.model_max_length) if self.has_t5 else 256

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self._check_length(prompts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        if not self.has_t5:
            embeds = embeds[:, : self.pipeline.tokenizer_max_length + 1]
        return Conditioning({"embeds": embeds, "pooled": pooled})

    def _check_length(self, prompts: Sequence[str]) -> None:
        """CLIP is always cut at 77 tokens and meant to be; a prompt that nobody reads to its end is an error."""
        pipeline = self.pipeline
        readers = [(pipeline.tokenizer, pipeline.tokenizer_max_length)]
        if self.has_t5:
            readers.append((pipeline.tokenizer_3, self.text_length))
        tokenizer, limit = max(readers, key=lambda reader: reader[1])
        for index, prompt in enumerate(prompts):
            count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if count > limit:
                start = " ".join(prompt.split()[:8])[:60]
                raise GeneratorError(f"prompt {index} ({start!r} ...) has {count} tokens, the model reads {limit}")

    def latent_shape(self) -> tuple[int, ...]:
        height, width = (side // self.pipeline.vae_scale_factor for side in self.size)
        return self.pipeline.transformer.config.in_channels, height, width

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.network(
            hidden_states=x.to(self.dtype),
            timestep=t * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond.tensors["embeds"].to(self.dtype),
            pooled_projections=cond.tensors["pooled"].to(self.dtype),
            joint_attention_kwargs={"null_tokens": self.text_length} if not self.has_t5 else None,
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        pixels = in_chunks(lambda z: vae.decode(z.to(vae.dtype), return_dict=False)[0], scaled, self._vae_batch())
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def encode_media(self, media: Tensor) -> Tensor:
        vae = self.pipeline.vae
        pixels = (media * 2 - 1).to(vae.dtype)
        latents = in_chunks(lambda x: vae.encode(x).latent_dist.mode(), pixels, self._vae_batch())
        return (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor

    def _vae_batch(self) -> int:
        pixels = VAE_PIXELS_CPU if self.device.type == "cpu" else VAE_PIXELS
        return pixels // (self.size[0] * self.size[1])

    def times(self, steps: int) -> Tensor:
        if steps < 1:
            raise GeneratorError(f"{steps} sampling steps: at least 1 is needed")
        scheduler = copy.deepcopy(self.pipeline.scheduler)  # set_timesteps would change the pipeline's
        config, options = scheduler.config, {}
        if config.use_dynamic_shifting:
            _, height, width = self.latent_shape()
            tokens = (height // self.pipeline.patch_size) * (width // self.pipeline.patch_size)
            shape = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            options["mu"] = calculate_shift(tokens, *shape)
        scheduler.set_timesteps(steps, **options)
        return scheduler.sigmas.float().cpu()
