"""FLUX.1 Fill, the inpainter: ``FluxFillPipeline``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from generators.adapters.flux import Flux
from generators.base import Conditioning
from generators.codec import encode, pack


class FluxFill(Flux):
    """FLUX whose tokens also carry the image around the hole and the mask; mask value 1 is regenerated."""

    pipeline_class = "FluxFillPipeline"
    inputs = ("image", "mask")
    guidance_default = 30.0

    def encode_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = (inputs["mask"].amax(1, keepdim=True) >= 0.5).float()
        grey = 0.5  # the pipeline blanks pixels in [-1, 1]
        outside = inputs["image"] * (1 - mask) + grey * mask
        fine = F.pixel_unshuffle(mask, self.pipeline.vae_scale_factor)  # every pixel of the mask, as channels
        return {"beside": torch.cat([encode(self.pipeline.vae, outside), fine], 1)}

    def tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        beside = cond.tensors["beside"]
        channels = x.shape[1]
        parts = [pack(x), pack(beside[:, :channels]), pack(beside[:, channels:])]
        return torch.cat(parts, -1), self.positions(x)
