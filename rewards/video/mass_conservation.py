"""Conservation of a reference video's content: distance of a video model's features (NewtonRewards)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from alignflow.lazy import lazy
from alignflow.paths import expanded
from rewards.base import Reward, RewardError, Scores
from rewards.digest import digest
from rewards.frames import middles
from rewards.model_settings import ModelRewardSettings
from rewards.networks.hub import from_pretrained, network, typed_line
from rewards.rows import column
from rewards.videos import at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks.preprocess import Preprocess
else:
    Preprocess = lazy("rewards.networks.preprocess:Preprocess")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MassConservation(ModelRewardSettings):
    """Negative squared distance of V-JEPA 2's features to those of the prompt's reference video (NewtonRewards).

    The prompt's column ``reference`` names a file in the folder ``references``. It keeps things from vanishing, and
    belongs beside ``kinetic_residual``. Differentiable.
    """

    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    kind: Literal["mass_conservation"] = Field("mass_conservation", description="feature distance to a reference video")
    references: Path = Field(description="folder of the reference videos (.mp4, .gif, .webp)")
    model: str = Field("facebook/vjepa2-vitl-fpc64-256", description="folder or hub id of a V-JEPA 2 model")
    chunk: int = Field(4, ge=1, description="videos per network call")
    frames: int | None = Field(None, ge=2, description="frames used per video, evenly spaced; null = all")

    def load(self, device: torch.device | str) -> Reward:
        """Load the model.

        Raises:
            RewardError: not there, another model, or no such folder of references.
        """
        if not expanded(self.references, RewardError).is_dir():
            raise RewardError(f"references: no folder {self.references}")
        model = _video_model(self.model, self.dtype, device)

        def function(media: Tensor, prompts: list[str], group: Tensor | None, metadata: list[Any]) -> Scores:
            import torch

            videos = at_least(media, 2, "mass_conservation")
            videos = videos[:, middles(videos.shape[1], self.frames)]
            values = [media.new_full((), torch.nan, dtype=torch.float32)] * len(videos)
            goals, reasons = {}, {}
            for index, row in enumerate(metadata):
                try:
                    goals[index] = self._reference(row, videos.shape[1]).to(videos.device)
                except ValueError as error:
                    reasons[index] = str(error)
            for part in torch.tensor(list(goals), dtype=torch.long).split(self.chunk) if goals else ():
                seen = video_features(model, videos[part])
                for index, feature in zip(part.tolist(), seen, strict=True):
                    with torch.no_grad():
                        goal = video_features(model, goals[index][None])[0]
                    values[index] = -(feature - goal).square().sum()
            return Scores(torch.stack(values) if values else media.new_zeros(0), reasons)

        return Reward(
            "mass_conservation",
            function,
            range=(float("-inf"), 0.0),
            differentiable=True,
            wants=("metadata",),
            fingerprint=lambda: digest(model.state_dict()),
        )

    def _reference(self, row: Mapping[str, Any], length: int) -> Tensor:
        """``[length, 3, H, W]`` of the video a row names; ValueError if there is none."""
        name = column(row, "reference", str, "file of a reference video")
        folder = expanded(self.references, RewardError).resolve()
        file = (folder / name).resolve()
        if not file.is_relative_to(folder) or not file.is_file():
            raise ValueError(f"no reference video {name!r} in {self.references}")
        video = _read(file)
        if len(video) < length:
            raise ValueError(f"the reference video {name!r} has {len(video)} frames, the sample {length}")
        return video[middles(len(video), length)]


def video_features(model: Any, videos: Tensor) -> Tensor:
    """``[N, F, 3, H, W]`` in [0, 1] -> ``[N, D]`` float32: the mean of V-JEPA 2's tokens.

    Frames are resized (bicubic, shorter side) and cropped to the model's square, and normalised as ImageNet's; an odd
    video's last frame is shown twice.
    """
    import torch

    side, span = model.config.crop_size, model.config.tubelet_size
    steps = Preprocess((side, side), "shorter", crop=(side, side), mean=MEAN, std=STD)
    frames = steps(videos.flatten(0, 1).to(model.device)).unflatten(0, videos.shape[:2])
    missing = -frames.shape[1] % span
    frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
    tokens = model(pixel_values_videos=frames.to(model.dtype), skip_predictor=True).last_hidden_state
    return tokens.float().mean(1)


def _video_model(path: str, dtype: str, device: torch.device | str) -> Any:
    import torch
    from transformers import AutoConfig, VJEPA2Model

    config = from_pretrained(AutoConfig, path)
    if config.model_type != "vjepa2":
        raise RewardError(f"{path} holds a {config.model_type} model, not V-JEPA 2")
    model = network(VJEPA2Model, path, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval().to(device)


@lru_cache(64)
def _read(file: Path) -> Tensor:
    import imageio.v3 as imageio
    import numpy as np
    import torch

    try:
        frames = np.asarray(imageio.imread(file))
    except Exception as error:  # its plugins raise errors of several packages
        raise ValueError(f"{file.name} cannot be read as a video: {typed_line(error)}") from error
    if frames.ndim != 4 or frames.shape[-1] < 3:
        raise ValueError(f"{file.name} is not a video: {list(frames.shape)}")
    return torch.from_numpy(frames[..., :3].copy()).permute(0, 3, 1, 2) / 255
