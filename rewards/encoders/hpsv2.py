"""Human Preference Score v2 and v2.1 (arXiv 2306.09341): CLIP ViT-H/14 fine-tuned on HPDv2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward
from rewards.model_settings import ModelRewardSettings
from rewards.packages import hpsv2_reward

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks.clip import Clip
else:
    Clip = lazy("rewards.networks.clip:Clip")

FILES = {"v2.0": "xswu/HPSv2/HPS_v2_compressed.pt", "v2.1": "xswu/HPSv2/HPS_v2.1_compressed.pt"}


class HumanPreferenceScore(ModelRewardSettings):
    """HPSv2, HPSv2.1: cosine of a CLIP trained on human choices, about 0.2 to 0.35.

    The whole image is seen: longest side to 224, black borders. The two versions' scores are not comparable.
    """

    kind: Literal["hpsv2"] = Field("hpsv2", description="Human Preference Score v2")
    version: Literal["v2.0", "v2.1"] = Field("v2.1", description="published weights to use")
    weights: str | None = Field(
        None, description="weight file, or owner/name/file on the hub; null = the published file"
    )
    processor: str = Field("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", description="folder or hub id of the tokenizer")
    variant: Literal["cosine", "percent"] = Field(
        "cosine", description="cosine = as computed by the package | percent = 100 cosine, as reported on leaderboards"
    )
    antialias: bool = Field(
        True,
        description="antialias when downscaling, as torchvision does since 0.17; false = as when the model was "
        "published",
    )
    backend: Literal["native", "package"] = Field(
        "native", description="native = built in | package = the installed hpsv2, one image at a time, without gradient"
    )

    def gradient(self) -> bool | None:
        """Only the native backend has one."""
        return self.backend == "native"

    def load(self, device: torch.device | str) -> Reward:
        """Load weights and tokenizer, or the package."""
        file = self.weights or FILES[self.version]
        factor = {"cosine": 1.0, "percent": 100.0}[self.variant]
        if self.backend == "package":
            return hpsv2_reward(file, factor, self.frames)
        clip = Clip.load(
            file, self.processor, self.dtype, device, preprocess="padded", antialias=self.antialias, repair=True
        )

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            return factor * clip.cosine(media, prompts, self.chunk, self.frames)

        return Reward("hpsv2", function, range=(-factor, factor), differentiable=True)
