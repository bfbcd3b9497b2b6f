"""LTX-Video text to video: ``LTXPipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from generators import codec
from generators.base import Conditioning
from generators.spacing import even_sigmas, spaced
from generators.video import VideoGenerator


class LTX(VideoGenerator):
    """Network with one token per latent, whose positions are in seconds and pixels.

    A VAE with a time argument decodes at 0, as its pipeline does by default; noise that such a decoder adds inside is
    the same for every video, so that a sample does not depend on what was decoded before it.
    """

    pipeline_class = "LTXPipeline"
    user_attention = ("attn2",)
    accepts = ("size", "frames", "text_length", "negative_prompt", "guidance_rescale", "fps")
    native_frames = 161

    def native_size(self) -> tuple[int, int]:
        return 512, 704

    def compression(self) -> tuple[int, int]:
        return self.pipeline.vae_temporal_compression_ratio, self.pipeline.vae_spatial_compression_ratio

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = self.options.text_length or 128
        self.check_length(prompts, self.pipeline.tokenizer, limit)
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=limit, device=self.device
        )
        return {"embeds": embeds, "mask": mask}

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        frames, height, width = x.shape[2:]
        time, space = self.compression()
        out = self.network(
            hidden_states=x.flatten(2).transpose(1, 2).to(self.dtype),
            timestep=t * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond.tensors["embeds"].to(self.dtype),
            encoder_attention_mask=cond.tensors["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(time / (self.options.fps or 25), space, space),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (frames, height, width))

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        if not vae.config.timestep_conditioning:
            return super().decode(latents)
        start = torch.zeros(1, device=latents.device, dtype=vae.dtype)
        return torch.cat([self._decode_at(start, video) for video in latents.split(1)])

    def _decode_at(self, time: Tensor, video: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            return codec.decode(self.pipeline.vae, video, temb=time)

    def times(self, steps: int) -> Tensor:
        _, frames, height, width = self.latent_shape()
        return spaced(self.pipeline.scheduler, steps, even_sigmas(steps), frames * height * width)
