"""Code shared by the video adapters: videos ``[N, F, 3, H, W]`` over latents ``[N, C, F', H', W']``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from generators.base import Generator, GeneratorError, Options


class VideoGenerator(Generator):
    """A generator of videos whose VAE keeps the first frame and compresses those after it in time.

    Attributes:
        frames: frames of a video, one more than a multiple of the VAE's compression in time.
    """

    accepts: tuple[str, ...] = ("size", "frames", "text_length", "negative_prompt")
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    native_frames = 81

    def __init__(self, pipeline: Any, options: Options | None = None) -> None:
        self.frames = (options.frames if options else None) or self.native_frames
        super().__init__(pipeline, options)

    def compression(self) -> tuple[int, int]:
        """How many (frames, pixels a side) become one latent."""
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial

    def size_multiple(self) -> int:
        patch = self.pipeline.transformer.config.patch_size
        return self.compression()[1] * (patch[-1] if isinstance(patch, list | tuple) else patch)

    def check_size(self) -> None:
        super().check_size()
        unit = self.compression()[0]
        if (self.frames - 1) % unit:
            below = (self.frames - 1) // unit * unit + 1
            raise GeneratorError(
                f"generator.frames {self.frames}: one more than a multiple of {unit}, such as {below} or {below + unit}"
            )

    def latent_shape(self) -> tuple[int, ...]:
        time, space = self.compression()
        return self.channels(), (self.frames - 1) // time + 1, self.size[0] // space, self.size[1] // space

    def channels(self) -> int:
        """Channels of the latents."""
        return self.pipeline.transformer.config.in_channels

    def guide(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance, rescaled to the conditional's spread by the share ``guidance_rescale``.

        Source: arXiv 2305.08891, section 3.4; a share of 0 is plain guidance.
        """
        guided = super().guide(unconditional, conditional, guidance)
        share = self.options.guidance_rescale
        if not share:
            return guided
        inner = list(range(1, guided.ndim))
        spread = conditional.std(inner, keepdim=True) / guided.std(inner, keepdim=True)
        return guided * (share * spread + 1 - share)
