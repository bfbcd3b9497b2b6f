"""Wan 2.1 and 2.2 image to video: ``WanImageToVideoPipeline``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from generators.adapters.wan import Wan
from generators.base import Conditioning, GeneratorError, Options

CONTEXT = 512  # diffusers' network takes what comes before the last 512 tokens for the image's


class WanI2V(Wan):
    """Wan with a given image as the first frame of the video.

    2.1 and the two experts of 2.2 read the image's latents and a mask as channels beside their own; 2.1 reads its
    CLIP features as well. In the 2.2 that counts time per token the image is the first frame itself, at time 0: the
    velocity there is the straight line's to the image, so every sampler ends on it and the forward process agrees.
    """

    pipeline_class = "WanImageToVideoPipeline"
    optional = ("transformer_2", "image_encoder", "image_processor")
    inputs = ("image",)

    def __init__(self, pipeline: Any, options: Options | None = None) -> None:
        super().__init__(pipeline, options)
        if self._reads_features():
            self.lora_targets = (*self.lora_targets, "add_k_proj", "add_v_proj")

    def _check_options(self) -> None:
        super()._check_options()
        if self.options.text_length not in (None, CONTEXT) and self._reads_features():
            raise GeneratorError(
                f"generator.text_length {self.options.text_length}: together with image features this network takes "
                f"exactly {CONTEXT} tokens; omit the setting"
            )

    def _reads_features(self) -> bool:
        return self.pipeline.transformer.config.image_dim is not None

    def encode_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        image = inputs["image"]
        first = image.unsqueeze(1)
        if self.pipeline.config.expand_timesteps:
            return {"first": self.encode_media(first)}
        grey = torch.full_like(first, 0.5).expand(-1, self.frames - 1, -1, -1, -1)
        latents = self.encode_media(torch.cat([first, grey], 1))
        given = torch.zeros_like(latents[:, : self.compression()[0]])
        given[:, :, 0] = 1
        encoded = {"beside": torch.cat([given, latents], 1)}
        if self._reads_features():
            encoded["features"] = self._features(image)
        return encoded

    def _features(self, images: Tensor) -> Tensor:
        """Last but one layer of CLIP's vision model, ``[B, L, D]``."""
        bytes_ = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pixels = self.pipeline.image_processor(images=list(bytes_), return_tensors="pt").pixel_values
        encoder = self.pipeline.image_encoder
        hidden = encoder(pixels.to(encoder.device, encoder.dtype), output_hidden_states=True).hidden_states
        return hidden[-2].to(self.dtype)

    def seen(self, x: Tensor, cond: Conditioning) -> Tensor:
        if "first" in cond.tensors:
            return torch.cat([cond.tensors["first"].to(x), x[:, :, 1:]], 2)
        return torch.cat([x, cond.tensors["beside"].to(x)], 1)

    def timestep(self, x: Tensor, t: Tensor) -> Tensor:
        times = super().timestep(x, t)
        if times.ndim == 1:
            return times
        frame = times.shape[1] // x.shape[2]
        return torch.cat([torch.zeros_like(times[:, :frame]), times[:, frame:]], 1)

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        v = super().predict(x, t, cond)
        if "first" not in cond.tensors:
            return v
        known = (x[:, :, :1] - cond.tensors["first"]) / t.view(-1, 1, 1, 1, 1)
        return torch.cat([known, v[:, :, 1:].to(known.dtype)], 2)
