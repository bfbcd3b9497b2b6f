"""LAION's aesthetic predictors v1 and v2: a linear head on OpenAI's CLIP image features; prompts are ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError
from rewards.model_settings import ModelRewardSettings
from rewards.networks.hub import weight_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from rewards.networks import heads
    from rewards.networks.clip import Clip
    from rewards.networks.state_dicts import read_state_dict
else:
    heads = lazy("rewards.networks.heads")
    read_state_dict = lazy("rewards.networks.state_dicts:read_state_dict")
    Clip = lazy("rewards.networks.clip:Clip")

FILES = {"v1": "sa_0_4_vit_l_14_linear.pth", "v2": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"}
PUBLISHED = {
    "v1": "github.com/LAION-AI/aesthetic-predictor publishes sa_0_4_vit_l_14_linear.pth (MIT)",
    "v2": "github.com/christophschuhmann/improved-aesthetic-predictor publishes sac+logos+ava1-l14-linearMSE.pth "
    "(Apache-2.0)",
}


class Aesthetic(ModelRewardSettings):
    """LAION aesthetic v1, v2: visual appeal regardless of the prompt, about 1 to 10."""

    kind: Literal["aesthetic"] = Field("aesthetic", description="LAION aesthetic predictor")
    version: Literal["v1", "v2"] = Field(
        "v2", description="v1 = one linear layer | v2 = five linear layers without activations"
    )
    head: str | None = Field(
        None, description="weight file of the head, or owner/name/file on the hub; null = the published file (v2 only)"
    )
    model: str = Field(
        "openai/clip-vit-large-patch14",
        description="CLIPModel the head was trained on: a folder, a hub id, or a file in open_clip's layout",
    )
    processor: str | None = Field(
        None, description="folder or hub id of the tokenizer; required only if model is a file"
    )

    def load(self, device: torch.device | str) -> Reward:
        """Load CLIP and the head."""
        head = load_head(self.head or FILES[self.version], self.version).to(device)
        clip = Clip.load(self.model, self.processor, self.dtype, device, preprocess="cropped", quick_gelu=True)
        width, wanted = clip.model.config.projection_dim, next(head.parameters()).shape[1]
        if width != wanted:
            raise RewardError(
                f"the head reads {wanted} features, but {self.model} has {width}; set the CLIP that the head "
                "was trained on"
            )

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            return clip.by_frame(media, lambda image, samples: head(image).squeeze(-1), self.chunk, self.frames)

        return Reward("aesthetic", function, differentiable=True)


def load_head(file: str, version: str) -> nn.Module:
    """The head in ``file``; raises RewardError if it is not there or of another architecture."""
    path = weight_file(file, PUBLISHED[version])
    what = f"LAION's aesthetic head {version}"
    state = read_state_dict(path)
    if version == "v1":
        return heads.load_linear(state, str(path), what)
    return heads.load_mlp(state, "layers.", str(path), what)
