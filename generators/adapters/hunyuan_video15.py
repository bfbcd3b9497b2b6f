"""HunyuanVideo-1.5 text to video: ``HunyuanVideo15Pipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from generators.adapters.flux import DOUBLE
from generators.base import Conditioning
from generators.codec import in_chunks
from generators.spacing import even_sigmas, spaced
from generators.video import VideoGenerator

AFTER = 5  # tokens of the chat template behind the prompt


class HunyuanVideo15(VideoGenerator):
    """Network with extra inputs for an image's latents, mask and features, all zero for text to video.

    It masks what is not there, so the padding of texts and of the image's features, 2000 tokens, is left out.
    Qwen2.5-VL reads the prompt inside a template, ByT5 what it puts in quotes. The pipeline's guider is a setting of
    its own calls; here guidance is the sampler's, as for every other model.
    """

    pipeline_class = "HunyuanVideo15Pipeline"
    accepts = ("size", "frames", "negative_prompt", "guidance_rescale")
    lora_targets = tuple(f"attn.{name}" for name in DOUBLE)
    native_frames = 121

    def idle(self) -> tuple[str, ...]:
        """The text stream of the last block: only keys and values of it reach the video."""
        last = f"transformer_blocks.{len(self.pipeline.transformer.transformer_blocks) - 1}"
        return f"{last}.attn.add_q_proj", f"{last}.attn.to_add_out", f"{last}.ff_context"

    def native_size(self) -> tuple[int, int]:
        wide, tall = self.pipeline.default_aspect_ratio
        processor = self.pipeline.video_processor
        height, width = processor.calculate_default_height_width(tall, wide, self.pipeline.target_size)
        return height, width

    def channels(self) -> int:
        return self.pipeline.num_channels_latents

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pipeline = self.pipeline
        self.check_length(prompts, pipeline.tokenizer, pipeline.tokenizer_max_length - AFTER)
        embeds, mask, glyphs, glyph_mask = pipeline.encode_prompt(
            list(prompts), device=self.device, dtype=self.dtype, batch_size=len(prompts)
        )
        embeds, mask = trimmed(embeds, mask)
        glyphs, glyph_mask = trimmed(glyphs, glyph_mask)
        return {"embeds": embeds, "mask": mask, "glyphs": glyphs, "glyph_mask": glyph_mask}

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        pipeline, given = self.pipeline, cond.tensors
        no_image = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        return self.network(
            hidden_states=torch.cat([x, *no_image], 1).to(self.dtype),
            timestep=(t * pipeline.scheduler.config.num_train_timesteps).to(self.dtype),
            encoder_hidden_states=given["embeds"].to(self.dtype),
            encoder_attention_mask=given["mask"],
            encoder_hidden_states_2=given["glyphs"].to(self.dtype),
            encoder_attention_mask_2=given["glyph_mask"],
            image_embeds=x.new_zeros(len(x), 1, pipeline.vision_states_dim, dtype=self.dtype),
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        return in_chunks(super().decode, latents, 1)  # diffusers' VAE attends wrongly shaped beyond one video

    def encode_media(self, media: Tensor) -> Tensor:
        return in_chunks(super().encode_media, media, 1)

    def times(self, steps: int) -> Tensor:
        return spaced(self.pipeline.scheduler, steps, even_sigmas(steps))


def trimmed(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Texts ``[B, L, D]`` and their mask ``[B, L]`` up to the last token that any row uses, at least one."""
    used = mask.bool().any(0).nonzero()
    length = int(used.max()) + 1 if len(used) else 1
    return embeds[:, :length], mask[:, :length]
