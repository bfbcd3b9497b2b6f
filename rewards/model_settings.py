"""Settings shared by rewards that load files, by those with a network, and by rewards of motion."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError, RewardSettings

if TYPE_CHECKING:
    import torch

    from rewards.networks.vision_features import VisionFeatures
else:
    VisionFeatures = lazy("rewards.networks.vision_features:VisionFeatures")


VISION_MODEL = "folder or hub id of DINO, DINOv2, ViT or a CLIPModel, or shapes (the embedded CLIP); weights are frozen"


class LoadedRewardSettings(RewardSettings):
    """A reward that loads files. A subclass has :meth:`load` in place of :meth:`build`."""

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Load what the reward needs onto ``device``.

        Raises:
            RewardError: files or a server missing, damaged or of another kind; names the reward.
        """
        try:
            return self.load(device)
        except RewardError as error:
            raise RewardError(f"reward {getattr(self, 'kind', '')!r}: {error}") from error

    def load(self, device: torch.device | str) -> Reward:
        """As :meth:`build`, with errors that do not name the reward."""
        raise NotImplementedError


class ModelRewardSettings(LoadedRewardSettings):
    """A network applied to ``chunk`` images at a time; a video's score is the mean over its frames."""

    passes_gradient: ClassVar[bool] = True
    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    chunk: int = Field(32, ge=1, description="images, or frames of videos, per network call")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="compute dtype of the network")
    frames: int | None = Field(
        None, ge=1, description="frames scored per video, evenly spaced and averaged; null = all"
    )


class VisionRewardSettings(ModelRewardSettings):
    """A reward on the features of a frozen vision model."""

    model: str = Field("facebook/dinov2-base", description=VISION_MODEL)

    def vision(self, device: torch.device | str) -> VisionFeatures:
        """Load the model; raises RewardError."""
        return VisionFeatures.load(self.model, self.dtype, device)


class FlowRewardSettings(RewardSettings):
    """A reward based on the optical flow of videos."""

    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    flow: str | None = Field(
        None,
        description="custom optical flow, package.module:name or file.py:name, with signature (first, second) -> "
        "[N, 2, H, W] in pixels; null = the built-in Lucas-Kanade pyramid, which needs textured "
        "content",
    )
    chunk: int = Field(32, ge=1, description="frame pairs per call")

    def gradient(self) -> bool | None:
        """Whether the optical flow has a gradient: the built-in one does; unknown for custom code."""
        return None if self.flow else True
