"""FLUX.1 Kontext, the editor: ``FluxKontextPipeline``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from generators.adapters.flux import Flux
from generators.base import Conditioning
from generators.codec import pack


class FluxKontext(Flux):
    """FLUX with the tokens of the source image after its own; their first position coordinate is 1."""

    pipeline_class = "FluxKontextPipeline"
    optional = ("image_encoder", "feature_extractor")
    inputs = ("image",)

    def encode_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"source": self.encode_media(inputs["image"])}

    def tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        source = cond.tensors["source"]
        where = self.positions(source)
        where[..., 0] = 1
        return torch.cat([pack(x), pack(source)], 1), torch.cat([self.positions(x), where])
