"""CLIPScore in its several published definitions, each selected by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward
from rewards.model_settings import ModelRewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks.clip import Clip
else:
    Clip = lazy("rewards.networks.clip:Clip")


class Published(NamedTuple):
    """A formula ``factor * cosine``, or ``factor * max(cosine, 0)``, and what it was published with."""

    model: str
    factor: float | None  # None: the model's own logit scale
    positive: bool
    prefix: str
    openai: bool  # read and tokenised by OpenAI's clip or open_clip, not by transformers


VARIANTS = {
    "hessel": Published("openai/clip-vit-base-patch32", 2.5, True, "A photo depicts ", True),
    "torchmetrics": Published("openai/clip-vit-large-patch14", 100.0, True, "", False),
    "image_reward": Published("openai/clip-vit-large-patch14", 1.0, False, "", True),
    "reno": Published("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None, False, "", False),
}


class ClipScore(ModelRewardSettings):
    """CLIPScore as defined by Hessel et al., torchmetrics, ImageReward's comparison or ReNO.

    Where a variant counts negative cosines as 0, so is their gradient.
    """

    kind: Literal["clip_score"] = Field("clip_score", description="CLIPScore")
    variant: Literal["hessel", "torchmetrics", "image_reward", "reno"] = Field(
        "hessel",
        description="hessel = 2.5 max(cos, 0) of 'A photo depicts ...', ViT-B/32 (arXiv 2104.08718) | torchmetrics = "
        "100 max(cos, 0), ViT-L/14 | image_reward = cos, ViT-L/14 | reno = logit scale times cos, LAION's ViT-H/14",
    )
    model: str | None = Field(None, description="folder, hub id or open_clip file; null = the variant's model")
    processor: str | None = Field(
        None, description="folder or hub id of the tokenizer and image settings; null = those of model"
    )

    def load(self, device: torch.device | str) -> Reward:
        """Load the variant's model, or another in its place."""
        asked = VARIANTS[self.variant]
        clip = Clip.load(
            self.model or asked.model,
            self.processor,
            self.dtype,
            device,
            preprocess="cropped" if asked.openai else "settings",
            quick_gelu=asked.model.startswith("openai/"),
            repair=asked.openai,
        )
        factor = clip.logit_scale if asked.factor is None else asked.factor

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            texts = [asked.prefix + prompt for prompt in prompts]
            return factor * clip.cosine(media, texts, self.chunk, self.frames, positive=asked.positive)

        lowest = 0.0 if asked.positive else -factor
        return Reward("clip_score", function, range=(lowest, factor), differentiable=True)
