"""CLIP similarity of an image and its prompt with any ``CLIPModel``, with gradients to the pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward
from rewards.digest import digest
from rewards.model_settings import ModelRewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks.clip import Clip
else:
    Clip = lazy("rewards.networks.clip:Clip")


class ClipReward(ModelRewardSettings):
    """CLIP similarity of image and prompt with any CLIPModel or open_clip file.

    For published scores see the rewards ``clip_score``, ``pick_score`` and ``hpsv2``.
    """

    kind: Literal["clip"] = Field("clip", description="CLIP similarity")
    model: str = Field(
        "shapes",
        description="shapes (the embedded world's CLIP), a CLIPModel folder, a hub id, or a file in open_clip's layout",
    )
    processor: str | None = Field(
        None, description="folder or hub id of the tokenizer and image settings; null = those of model"
    )
    quick_gelu: bool = Field(False, description="use QuickGELU for a file's activation, as OpenAI's weights require")
    variant: Literal["cosine", "percent", "logit"] = Field(
        "cosine", description="cosine = in -1..1 | percent = 100 cosine | logit = cosine times the model's logit scale"
    )

    def load(self, device: torch.device | str) -> Reward:
        """Load model, tokenizer and image settings."""
        clip = Clip.load(self.model, self.processor, self.dtype, device, quick_gelu=self.quick_gelu)
        scale = {"cosine": 1.0, "percent": 100.0, "logit": clip.logit_scale}[self.variant]

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            return scale * clip.cosine(media, prompts, self.chunk, self.frames)

        return Reward(
            "clip",
            function,
            range=(-scale, scale),
            differentiable=True,
            fingerprint=lambda: digest(clip.model.state_dict()),
            embed=lambda media, prompts: clip.media_features(media, self.chunk),
        )
