"""FLUX.2 dev as an editor: ``Flux2Pipeline`` with one source image per prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from generators.adapters.flux2 import Flux2
from generators.base import Conditioning

SOURCE_AREA = 1024 * 1024  # pixels; the pipeline shrinks what is larger
SOURCE_TIME = 10  # first coordinate of the first source image's tokens


class Flux2Edit(Flux2):
    """FLUX.2 with the tokens of the source image, in 8 bits and at most one megapixel, after its own."""

    pipeline_class = "Flux2Pipeline"
    inputs = ("image",)

    def encode_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        processor = self.pipeline.image_processor
        images = processor.numpy_to_pil(processor.pt_to_numpy(inputs["image"]))
        pixels = torch.cat([self._fitted(image) for image in images]).to(self.device)
        return {"source": self.encode_media(pixels / 2 + 0.5)}

    def _fitted(self, image: Any) -> Tensor:
        """Shrunk to the area and cropped to whole tokens, ``[1, 3, H, W]`` in [-1, 1]."""
        processor, unit = self.pipeline.image_processor, self.size_multiple()
        width, height = (image := processor._resize_if_exceeds_area(image, SOURCE_AREA)).size
        return processor.preprocess(image, height // unit * unit, width // unit * unit, resize_mode="crop")

    def tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        own, ids = super().tokens(x, cond)
        source, where = super().tokens(cond.tensors["source"], cond)
        where = where + where.new_tensor([SOURCE_TIME, 0, 0, 0])
        return torch.cat([own, source], 1), torch.cat([ids, where])
