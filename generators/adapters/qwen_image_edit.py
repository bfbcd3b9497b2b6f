"""Qwen-Image-Edit: ``QwenImageEditPipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from torch import Tensor

from generators.adapters.qwen_image import QwenImage, whole
from generators.base import Conditioning


class QwenImageEdit(QwenImage):
    """Qwen-Image with the source image as input to the text encoder and as tokens after the latents.

    For either the pipeline brings the image, in 8 bits, to its own area, whatever :attr:`size` is. A negative
    prompt is read beside each image as well, so every row of a conditioning carries both texts.

    Attributes:
        seen_area: pixels of the image that the text encoder sees, about.
        source_area: pixels of the image that becomes tokens, about.
    """

    pipeline_class = "QwenImageEditPipeline"
    accepts = ("size", "negative_prompt")
    inputs = ("image",)
    seen_area = source_area = 1024 * 1024

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = self._resized(inputs["image"], self.seen_area)
        negative = self._read([self.options.negative_prompt] * len(prompts), images)
        return {**self._read(prompts, images), **{f"negative_{name}": value for name, value in negative.items()}}

    def encode_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = self._resized(inputs["image"], self.source_area)
        pixels = self.pipeline.image_processor.preprocess(images).to(self.device)
        return {"source": self.encode_media(pixels / 2 + 0.5)}

    def negative(self, cond: Conditioning) -> Conditioning:
        texts = {name: cond.tensors[f"negative_{name}"] for name in ("embeds", "mask")}
        return Conditioning({name: texts.get(name, value) for name, value in cond.tensors.items()})

    def tokens(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, list[tuple[int, int, int]]]:
        own, shapes = super().tokens(x, cond)
        source, more = super().tokens(cond.tensors["source"], cond)
        return torch.cat([own, source], 1), shapes + more

    def _read(self, prompts: Sequence[str], images: Sequence[Any]) -> dict[str, Tensor]:
        """Texts read beside their images one by one: Edit-Plus would show every prompt all of them."""
        rows = []
        for prompt, image in zip(prompts, images, strict=True):
            embeds, _ = self.pipeline.encode_prompt([prompt], [image], device=self.device)
            rows.append(Conditioning({"embeds": embeds, "mask": whole(embeds)}))
        return Conditioning.cat(rows).tensors

    def _resized(self, image: Tensor, area: int) -> list[Any]:
        """``[B, 3, H, W]`` in [0, 1] -> PIL images of about ``area`` pixels, sides multiples of 32."""
        processor = self.pipeline.image_processor
        height, width = image.shape[-2:]
        width, height = pipeline_qwenimage_edit.calculate_dimensions(area, width / height)[:2]
        images = processor.numpy_to_pil(processor.pt_to_numpy(image))
        return [processor.resize(image, height, width) for image in images]
