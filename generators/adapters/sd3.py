"""Stable Diffusion 3 and 3.5: ``StableDiffusion3Pipeline``, with or without its T5 encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from generators.base import Conditioning, Generator, Options
from generators.sd3_attention import fold_null_tokens
from generators.spacing import spaced


class SD3(Generator):
    """MMDiT that predicts ``eps - x0`` at ``timestep = 1000 t``: the convention of :mod:`generators.base` as it is."""

    pipeline_class = "StableDiffusion3Pipeline"
    accepts = ("size", "text_length", "negative_prompt")
    optional = ("text_encoder_3", "tokenizer_3")
    text_loras = ("text_encoder", "text_encoder_2")
    user_attention = ("attn",)
    lora_targets = tuple(
        f"attn.{name}"
        for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
    )

    def __init__(self, pipeline: Any, options: Options | None = None) -> None:
        super().__init__(pipeline, options)
        t5 = pipeline.text_encoder_3  # a final norm of zero makes it a placeholder: its tokens are zeros
        self.has_t5 = t5 is not None and bool(t5.encoder.final_layer_norm.weight.any())
        fold_null_tokens(self.backbone)
        pipeline.vae.to(memory_format=torch.channels_last)  # convolutions run up to twice as fast

    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size

    def largest_side(self) -> int:
        return self.size_multiple() * self.pipeline.transformer.config.pos_embed_max_size

    @property
    def text_length(self) -> int:
        """T5's share of the text tokens: the pipeline's default ``max_sequence_length``, or its tokenizer's if shorter.

        Without T5 the pipeline puts as many zeros there and the network attends to them; here one stands for all.
        """
        asked = self.options.text_length or 256
        return min(asked, self.pipeline.tokenizer_3.model_max_length) if self.has_t5 else asked

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pipeline = self.pipeline
        readers = [(pipeline.tokenizer, pipeline.tokenizer_max_length)]  # cut at 77 tokens, and meant to be
        if self.has_t5:
            readers.append((pipeline.tokenizer_3, self.text_length))
        self.check_length(prompts, *max(readers, key=lambda reader: reader[1]))
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
        return {"embeds": embeds, "pooled": pooled}

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

    def times(self, steps: int) -> Tensor:
        _, height, width = self.latent_shape()
        return spaced(self.pipeline.scheduler, steps, tokens=height * width // self.pipeline.patch_size**2)
