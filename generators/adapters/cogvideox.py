"""CogVideoX and CogVideoX 1.5 text to video: ``CogVideoXPipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from generators.base import Conditioning, GeneratorError, Options
from generators.spacing import told
from generators.video import VideoGenerator


class CogVideoX(VideoGenerator):
    """A variance-preserving diffusion seen as a flow.

    Its latents are ``z = a x0 + s eps`` with ``a^2 + s^2 = 1``, and its network answers ``w = a eps - s x0``; so
    ``x0_hat = a z - s w`` and ``eps_hat = s z + a w``. With ``t = s / (a + s)``, the rescaled ``x = z / (a + s)`` is
    ``(1 - t) x0 + t eps``, a flow's, and its velocity is ``v = eps_hat - x0_hat = (s - a) z + (a + s) w``.
    A DDIM step without noise, ``z' = a' x0_hat + s' eps_hat``, divided by ``a' + s'``, is
    ``x' = (1 - t') x0_hat + t' eps_hat = x + (t' - t) v``: the Euler step. At t = 1 (a = 0) and t = 0 (s = 0), z = x.

    The network counts time in indices of the scheduler's table; between two of them we interpolate in t. The
    pipeline's DDIM goes down by ``1000 // steps`` whatever its next time is; where that differs (steps that do not
    divide 1000, spacing ``linspace``), we step to the next time itself. Its ``use_dynamic_cfg`` is not offered.
    """

    pipeline_class = "CogVideoXPipeline"
    schedulers = ("CogVideoXDDIMScheduler", "DDIMScheduler")
    accepts = ("size", "frames", "negative_prompt")  # the network's positions fix the length of the text

    def __init__(self, pipeline: Any, options: Options | None = None) -> None:
        config = pipeline.scheduler.config
        if config.prediction_type != "v_prediction":
            raise GeneratorError(
                f"the scheduler's prediction_type is {config.prediction_type}; this adapter reads only v_prediction"
            )
        power = pipeline.scheduler.alphas_cumprod.double()
        signal, noise = power.sqrt(), (1 - power).sqrt()
        self.flow_times = (noise / (signal + noise)).float()  # time of every index, rising
        self.native_frames = pipeline.transformer.config.sample_frames
        super().__init__(pipeline, options)

    def native_size(self) -> tuple[int, int]:
        config, space = self.pipeline.transformer.config, self.pipeline.vae_scale_factor_spatial
        return config.sample_height * space, config.sample_width * space

    def check_size(self) -> None:
        super().check_size()
        tall, wide = self.native_size()
        if self._frames_a_patch() > 1 and (self.size[0] > tall or self.size[1] > wide):
            raise GeneratorError(f"generator.size {list(self.size)}: this network has positions for {tall} x {wide}")

    def _frames_a_patch(self) -> int:
        return self.pipeline.transformer.config.patch_size_t or 1

    def _padding(self) -> int:
        """Latent frames before the video's own that fill up the first patch, in 1.5."""
        return -super().latent_shape()[1] % self._frames_a_patch()

    def latent_shape(self) -> tuple[int, ...]:
        channels, frames, height, width = super().latent_shape()
        return channels, frames + self._padding(), height, width

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, :, self._padding() :])

    def encode_media(self, media: Tensor) -> Tensor:
        """Inverse of :meth:`decode`; the frames before the video repeat its first, as 1.5 was trained."""
        latents = super().encode_media(media)
        return torch.cat([latents[:, :, :1].expand(-1, -1, self._padding(), -1, -1), latents], 2)

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = self.pipeline.transformer.config.max_text_seq_length
        self.check_length(prompts, self.pipeline.tokenizer, limit)
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=limit, device=self.device
        )
        return {"embeds": embeds}

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        t_ = t.view(-1, 1, 1, 1, 1)
        total = ((1 - t_) ** 2 + t_**2).rsqrt()  # a + s; t = s / (a + s) gives a and s
        z = x * total
        w = self.network(
            hidden_states=z.transpose(1, 2).to(self.dtype),
            timestep=self.timestep(t),
            encoder_hidden_states=cond.tensors["embeds"].to(self.dtype),
            image_rotary_emb=self._positions(x),
            return_dict=False,
        )[0].transpose(1, 2)
        return (2 * t_ - 1) * total * z + total * w.float()

    def timestep(self, t: Tensor) -> Tensor:
        """Index in the scheduler's table, ``[N]``, a fraction between two entries and never beyond the ends."""
        table = self.flow_times.to(t.device)
        above = torch.searchsorted(table, t.contiguous()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return above - 1 + ((t - low) / (high - low)).clamp(0, 1)

    def _positions(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.pipeline.transformer.config.use_rotary_positional_embeddings:
            return None
        return self.pipeline._prepare_rotary_positional_embeddings(*self.size, x.shape[2], x.device)

    def times(self, steps: int) -> Tensor:
        grid = self.flow_times[told(self.pipeline.scheduler, steps).timesteps.cpu()]
        if grid[0] < 1:
            raise GeneratorError(
                f"the scheduler starts at t = {float(grid[0]):.3f}, not at pure noise: it needs rescale_betas_zero_snr "
                "and timestep_spacing trailing or linspace in scheduler/scheduler_config.json"
            )
        return torch.cat([grid, torch.zeros(1)])
