"""Sana and Sana 1.5: ``SanaPipeline``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from generators.base import Conditioning, Generator
from generators.spacing import spaced


class Sana(Generator):
    """Network on latents 32 times smaller than the image, with an instruction before the prompt in the text encoder.

    It generates the requested size; the pipeline, unless ``use_resolution_binning=False``, generates the nearest ratio
    of its training and crops. Released folders name DPM-Solver++(2M): sampler ``dpm2`` gives the same images.
    """

    pipeline_class = "SanaPipeline"
    user_attention = ("attn2",)
    accepts: tuple[str, ...] = ("size", "text_length", "negative_prompt")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # self-attention, which is linear, and cross-attention

    def native_size(self) -> tuple[int, int]:
        side = self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor
        return side, side

    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        told = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"]
        return self._read(prompts, told.default)

    def encode_negative(self) -> dict[str, Tensor]:
        return self._read([self.options.negative_prompt], None)

    def _read(self, prompts: Sequence[str], instruction: list[str] | None) -> dict[str, Tensor]:
        """Texts ``[B, L, D]`` after ``instruction``, of which the network sees the last token, and their mask."""
        limit = self.options.text_length or 300
        self.check_length(prompts, self.pipeline.tokenizer, limit - bool(instruction))
        only_prompts = {"do_classifier_free_guidance": False} if "negative_prompt" in self.accepts else {}
        embeds, mask = self.pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            max_sequence_length=limit,
            complex_human_instruction=instruction,
            **only_prompts,
        )[:2]
        return {"embeds": embeds, "mask": mask}

    def latent_shape(self) -> tuple[int, ...]:
        height, width = (side // self.pipeline.vae_scale_factor for side in self.size)
        return self.pipeline.transformer.config.in_channels, height, width

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        out = self.network(
            x.to(self.dtype),
            encoder_hidden_states=cond.tensors["embeds"].to(self.dtype),
            encoder_attention_mask=cond.tensors["mask"],
            timestep=self.timestep(t),
            guidance=self.guidance_input(t),
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]  # a network that learned its variance puts it behind

    def timestep(self, t: Tensor) -> Tensor:
        """``1000 t``, in whole numbers where the scheduler counts so, on the network's scale."""
        config = self.pipeline.scheduler.config
        count = t * config.num_train_timesteps
        if config.get("use_flow_sigmas"):  # a scheduler made for diffusion
            count = torch.floor(count)
        return count * self.pipeline.transformer.config.timestep_scale

    def times(self, steps: int) -> Tensor:
        return spaced(self.pipeline.scheduler, steps)
