"""HunyuanVideo text to video: ``HunyuanVideoPipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from generators.adapters.flux import DOUBLE
from generators.base import Conditioning
from generators.spacing import even_sigmas, spaced
from generators.video import VideoGenerator


class HunyuanVideo(VideoGenerator):
    """Network that takes its time and its guidance scale times 1000; CFG on top is "true CFG".

    Llama reads the prompt inside a template, CLIP the bare prompt's first 77 tokens.
    """

    pipeline_class = "HunyuanVideoPipeline"
    user_attention = ("attn",)
    accepts = ("size", "frames", "text_length", "embedded_guidance", "negative_prompt")
    lora_targets = tuple(f"attn.{name}" for name in DOUBLE)
    guidance_default = 6.0
    native_frames = 129

    def native_size(self) -> tuple[int, int]:
        return 720, 1280

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = self.options.text_length or 256
        self.check_length(prompts, self.pipeline.tokenizer, limit)
        embeds, pooled, mask = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=limit)
        return {"embeds": embeds, "pooled": pooled, "mask": mask}

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        guidance = self.guidance_input(t)
        return self.network(
            hidden_states=x.to(self.dtype),
            timestep=t * self.pipeline.scheduler.config.num_train_timesteps,
            guidance=None if guidance is None else (guidance * 1000).to(self.dtype),
            encoder_hidden_states=cond.tensors["embeds"].to(self.dtype),
            encoder_attention_mask=cond.tensors["mask"].to(self.dtype),
            pooled_projections=cond.tensors["pooled"].to(self.dtype),
            return_dict=False,
        )[0]

    def times(self, steps: int) -> Tensor:
        return spaced(self.pipeline.scheduler, steps, even_sigmas(steps))
