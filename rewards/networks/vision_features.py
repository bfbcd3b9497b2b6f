"""Images -> features of a frozen vision model of transformers (DINOv2, ViT, CLIP), with gradients to the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from rewards.base import RewardError
from rewards.networks.hub import find_model, from_pretrained, network
from rewards.networks.preprocess import Preprocess


@dataclass(frozen=True)
class VisionFeatures:
    """Model and preprocessing. The feature is CLIP's image embedding, or the class token of other models."""

    model: Any
    preprocess: Preprocess

    @classmethod
    def load(cls, path: str, dtype: str, device: torch.device | str) -> VisionFeatures:
        """Read both; images are resized bicubically, whatever the processor's own filter.

        Args:
            path: ``shapes``, folder or hub id.

        Raises:
            RewardError: not there, damaged, weights missing, or not a model of images.
        """
        folder = find_model(path)
        config = from_pretrained(AutoConfig, folder)
        if config.model_type != "clip" and not hasattr(config, "patch_size"):
            raise RewardError(f"{path} holds a {config.model_type} model, not a vision transformer or CLIPModel")
        model = network(AutoModel, folder, idle=("pooler.",), dtype=getattr(torch, dtype))
        steps = Preprocess.of_processor(from_pretrained(AutoImageProcessor, folder))
        return cls(model.requires_grad_(False).eval().to(device), steps)

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1] -> unit rows ``[N, D]`` float32."""
        return self.tokens(images)[:, 0]

    def tokens(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1] -> unit rows ``[N, 1 + P, D]`` float32: the feature, then those of P patches.

        CLIP's patches are normed and projected as its class token is.
        """
        pixels = self.preprocess(images.to(self.model.device)).to(self.model.dtype)
        if self.model.config.model_type == "clip":
            vision = self.model.vision_model
            hidden = vision(pixel_values=pixels).last_hidden_state
            found = self.model.visual_projection(vision.post_layernorm(hidden))
        else:
            hidden = self.model(pixel_values=pixels).last_hidden_state
            registers = getattr(self.model.config, "num_register_tokens", 0)  # later DINOv2 models have some
            found = torch.cat([hidden[:, :1], hidden[:, 1 + registers :]], 1)
        return F.normalize(found.float(), dim=-1)

    def of_videos(self, videos: Tensor, chunk: int, patches: bool = False) -> Tensor:
        """``[N, F, 3, H, W]`` -> ``[N, F, D]``, or with patches ``[N, F, 1 + P, D]``, ``chunk`` frames at a time."""
        read = self.tokens if patches else self
        return torch.cat([read(part) for part in videos.flatten(0, 1).split(chunk)]).unflatten(0, videos.shape[:2])
