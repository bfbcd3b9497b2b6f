"""Backbone and head together, for training and for loading a reward folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.base import RewardError
from rewards.networks.clip import Clip
from rewards.training.heads import Head
from rewards.training.settings import Backbone

ATTENTION = ["q_proj", "v_proj"]


def load_backbone(settings: Backbone, device: torch.device | str, dtype: str = "float32") -> Clip:
    """The frozen CLIP; raises RewardError."""
    return Clip.load(settings.model, settings.processor, dtype, device, quick_gelu=settings.quick_gelu)


def open_backbone(clip: Clip, settings: Backbone, seed: int) -> list[torch.nn.Parameter]:
    """Make trainable what ``tune`` says; returns those parameters."""
    tower = clip.model.vision_model
    if settings.tune == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(
                LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=ATTENTION), tower
            )
    elif settings.tune == "last":
        layers = tower.encoder.layers
        if settings.layers > len(layers):
            raise RewardError(f"backbone.layers: {settings.layers} of a vision tower with {len(layers)} layers")
        for part in (*layers[-settings.layers :], tower.post_layernorm, clip.model.visual_projection):
            part.requires_grad_(True)
    return [parameter for parameter in clip.model.parameters() if parameter.requires_grad]


def plain_state(clip: Clip) -> dict[str, Tensor]:
    """The vision side's weights under their own names, a LoRA merged into them."""
    merged: dict[str, Tensor] = {}
    for name, module in clip.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.base_layer.weight
            merged[f"{name}.weight"] = (base + module.get_delta_weight("default").to(base.dtype)).detach().clone()
    state = {name.replace(".base_layer", ""): value for name, value in clip.model.state_dict().items()}
    kept = {name: value for name, value in state.items() if "lora_" not in name and name.startswith("vis")}
    return {**{name: value.detach().clone() for name, value in kept.items()}, **merged}


class Scorer:
    """Images and prompts -> outputs of the head ``[N, K]``, with gradients.

    A video's features are the mean of its frames', at unit length.
    """

    def __init__(self, clip: Clip, head: Head) -> None:
        self.clip, self.head = clip, head

    def pixels(self, media: Tensor) -> Tensor:
        """One image ``[3, H, W]`` or video ``[F, 3, H, W]`` in [0, 1] of any size -> ``[F, 3, h, w]`` normalised."""
        frames = media if media.ndim == 4 else media[None]
        return self.clip.preprocess(frames.to(self.clip.model.device))

    def embed(self, pixels: Sequence[Tensor], chunk: int) -> Tensor:
        """Unit features ``[N, D]`` float32 of N normalised images or videos."""
        parts = torch.cat(list(pixels)).split(chunk)
        seen = torch.cat([self.clip.pixel_features(part) for part in parts]).split([len(one) for one in pixels])
        return F.normalize(torch.stack([frames.mean(0) for frames in seen]), dim=-1)

    def read(self, media: Tensor, prompts: list[str], chunk: int) -> tuple[Tensor, Tensor]:
        """Unit features ``[N, D]`` of media ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` and of their prompts."""
        image = self.embed([self.pixels(one) for one in media], chunk)
        return image, self.clip.text_features(prompts, chunk)

    def outputs(self, image: Tensor, text: Tensor, user: int | Tensor | None) -> Tensor:
        """``[N, K]`` of features.

        Args:
            user: number of a known user, ``[1, ...]`` of a newcomer, or None for nobody in particular.
        """
        if isinstance(user, int):
            user = torch.tensor([user], device=image.device)
        return self.head(image, text, None if user is None else user.expand(len(image), *user.shape[1:]))
