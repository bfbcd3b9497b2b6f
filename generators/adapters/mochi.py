"""Mochi 1 text to video: ``MochiPipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from torch import Tensor

from generators.adapters.flux import DOUBLE
from generators.base import Conditioning, GeneratorError
from generators.spacing import spaced
from generators.video import VideoGenerator

THRESHOLD = 0.025  # noise taken away by the linear first half of the steps, as in the pipeline


class Mochi(VideoGenerator):
    """Network whose time runs from noise to sample, times 1000, and which predicts ``x0 - eps``.

    Its grid is linear and fine near the noise, then quadratic.
    """

    pipeline_class = "MochiPipeline"
    lora_targets = tuple(f"attn1.{name}" for name in DOUBLE)
    native_frames = 19

    def idle(self) -> tuple[str, ...]:
        """The text stream of the last block: only keys and values of it reach the video."""
        last = f"transformer_blocks.{len(self.pipeline.transformer.transformer_blocks) - 1}"
        return (f"{last}.attn1.add_q_proj",)

    def native_size(self) -> tuple[int, int]:
        return self.pipeline.default_height, self.pipeline.default_width

    def compression(self) -> tuple[int, int]:
        return self.pipeline.vae_temporal_scale_factor, self.pipeline.vae_spatial_scale_factor

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = self.options.text_length or 256
        self.check_length(prompts, self.pipeline.tokenizer, limit)
        rows = [  # one by one: the pipeline blanks all prompts of a call whose last one is empty
            self.pipeline.encode_prompt(
                [prompt], do_classifier_free_guidance=False, max_sequence_length=limit, device=self.device
            )
            for prompt in prompts
        ]
        return {"embeds": torch.cat([row[0] for row in rows]), "mask": torch.cat([row[1] for row in rows])}

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return -self.network(
            hidden_states=x.to(self.dtype),
            timestep=(1 - t) * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond.tensors["embeds"].to(self.dtype),
            encoder_attention_mask=cond.tensors["mask"],
            return_dict=False,
        )[0]

    def times(self, steps: int) -> Tensor:
        if steps < 2:
            raise GeneratorError(f"{steps} sampling steps: Mochi's grid needs at least 2, for its two parts")
        return spaced(self.pipeline.scheduler, steps, linear_quadratic_schedule(steps, THRESHOLD), rising=True)
