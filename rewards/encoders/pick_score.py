"""PickScore (arXiv 2305.01569): CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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


class PickScore(ModelRewardSettings):
    """PickScore: logit scale times cosine of a CLIP trained on users' choices, about 17 to 24."""

    kind: Literal["pick_score"] = Field("pick_score", description="PickScore")
    model: str = Field("yuvalkirstain/PickScore_v1", description="folder or hub id of the CLIPModel")
    processor: str = Field(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", description="folder or hub id of the tokenizer and image settings"
    )
    variant: Literal["logit", "cosine", "flow_grpo", "probability"] = Field(
        "logit",
        description="logit = scale times cosine, as published | cosine = without the scale (DAS) | flow_grpo = "
        "logit / 26 | probability = softmax of the logits over the samples of a prompt: how often "
        "the sample would be picked",
    )

    def load(self, device: torch.device | str) -> Reward:
        """Load model, tokenizer and image settings."""
        clip = Clip.load(self.model, self.processor, self.dtype, device)
        scale = clip.logit_scale
        factor = {"cosine": 1.0, "flow_grpo": scale / 26}.get(self.variant, scale)

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            logits = factor * clip.cosine(media, prompts, self.chunk, self.frames)
            return among(logits, prompts, group) if self.variant == "probability" else logits

        span = (0.0, 1.0) if self.variant == "probability" else (-factor, factor)
        return Reward("pick_score", function, range=span, differentiable=True)


def among(logits: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
    """Softmax ``[N]`` among the samples of each group, or of each prompt where there is no ``group [N]``."""
    first: dict[object, int] = {}
    keys = prompts if group is None else group.tolist()
    number = logits.new_tensor([first.setdefault(key, len(first)) for key in keys])
    same = number[:, None] == number[None]
    return (logits - logits[None].masked_fill(~same, float("-inf")).logsumexp(1)).exp()
