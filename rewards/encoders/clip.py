"""CLIP similarity of an image and its prompt with any ``CLIPModel``, with gradients to the pixels."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from alignflow.paths import expanded
from rewards.base import Reward, RewardError
from rewards.digest import digest
from rewards.model_settings import ModelRewardSettings
from rewards.networks.hub import is_file

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
        processor = weights(self.processor or self.model)
        clip = Clip.load(weights(self.model), processor, self.dtype, device, quick_gelu=self.quick_gelu)
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


def weights(path: str, embedded: str = "clip") -> str:
    """What is to be read: the folder of an embedded model, a file, a folder, or a hub id.

    Embedded models lie with the world they were trained on; only their folder is named here, nothing is imported.

    Args:
        embedded: which of the embedded models ``shapes`` stands for.

    Raises:
        RewardError: none of these.
    """
    shapes = Path(str(files("alignflow.worlds.shapes"))) / "weights" / embedded
    folder = shapes if path == "shapes" else expanded(path, RewardError)
    if folder.is_dir():
        return str(folder)
    if path == "shapes":
        raise RewardError(f"there is no embedded {embedded}: no folder {folder}")
    if not is_file(path) and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise RewardError(f"no folder {folder}; model is shapes, a folder, a file of weights, or a hub id owner/name")
    return path
