"""A ``CLIPModel`` that takes tensors: resized, cropped and normalised here, so that gradients reach the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from rewards.base import RewardError
from rewards.clip import from_pretrained


@dataclass(frozen=True)
class Clip:
    """Model, tokenizer and image settings, ready to score."""

    model: Any
    tokenizer: Any
    images: Any

    @classmethod
    def load(cls, path: str, processor: str, dtype: str, device: torch.device | str) -> Clip:
        """Read them; raises RewardError for weights that are of another model or incomplete."""
        config = from_pretrained(AutoConfig, path)
        if config.model_type != "clip":
            raise RewardError(f"reward 'clip': {path} holds a {config.model_type} model, not a CLIPModel")
        model, report = from_pretrained(CLIPModel, path, dtype=getattr(torch, dtype), output_loading_info=True)
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise RewardError(f"reward 'clip': {path} lacks {len(missing)} weights, first {', '.join(missing[:3])}")
        model.requires_grad_(False).eval().to(device)
        tokenizer = from_pretrained(AutoTokenizer, processor)
        return cls(model, tokenizer, from_pretrained(CLIPImageProcessorPil, processor))

    @property
    def logit_scale(self) -> float:
        """What the model multiplies cosines by, e.g. 100."""
        return self.model.logit_scale.exp().item()

    def similarity(self, media: Tensor, prompts: list[str], batch: int) -> Tensor:
        """Cosine ``[N]`` of ``media`` (``[N, 3, H, W]``, or ``[N, F, 3, H, W]``: mean over frames) and ``prompts``."""
        frames = media.flatten(0, -4)
        per_sample = len(frames) // max(1, len(media))
        seen = [self.image_features(part) for part in frames.split(batch)]
        image = torch.cat(seen).unflatten(0, (len(media), per_sample))
        return (image * self.text_features(prompts, batch)[:, None]).sum(-1).mean(1)

    def image_features(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1] -> unit rows ``[N, D]`` float32."""
        pixels = preprocess(images, self.images).to(self.model.device, self.model.dtype)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: list[str], batch: int) -> Tensor:
        """Unit rows ``[N, D]`` float32; equal prompts are read once, long ones cut as CLIP does."""
        distinct = list(dict.fromkeys(prompts))
        limit = self.model.config.text_config.max_position_embeddings
        rows = []
        for start in range(0, len(distinct), batch):
            tokens = self.tokenizer(
                distinct[start : start + batch], padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
            ids, mask = tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)
            rows.append(self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output.float())
        place = {prompt: i for i, prompt in enumerate(distinct)}
        return F.normalize(torch.cat(rows), dim=-1)[[place[prompt] for prompt in prompts]]


def preprocess(images: Tensor, settings: Any) -> Tensor:
    """``[N, 3, H, W]`` in [0, 1] -> what CLIP's image processor makes of them, as tensor operations.

    Shorter side to ``size`` (bicubic with antialiasing, as PIL; values beyond [0, 1] are cut), centre crop, normalise.
    """
    images = images.float()
    if settings.do_resize:
        images = _resize(images, settings.size)
    if settings.do_center_crop:
        images = _center_crop(images, settings.crop_size["height"], settings.crop_size["width"])
    mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (settings.image_mean, settings.image_std))
    return (images - mean) / std


def _resize(images: Tensor, size: Any) -> Tensor:
    height, width = images.shape[-2:]
    if size.get("shortest_edge"):
        short, long = min(height, width), max(height, width)
        other = int(size["shortest_edge"] * long / short)
        target = (size["shortest_edge"], other) if height <= width else (other, size["shortest_edge"])
    else:
        target = (size["height"], size["width"])
    if target == (height, width):
        return images
    return F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def _center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The middle ``height x width``, with zeros around an image that is smaller."""
    extra = [max(0, height - images.shape[-2]), max(0, width - images.shape[-1])]
    if any(extra):
        top, left = (extra[0] + 1) // 2, (extra[1] + 1) // 2
        images = F.pad(images, (left, extra[1] - left, top, extra[0] - top))
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]
