"""Another reward on its own device and in its own precision."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from alignflow.devices import malformed, unusable
from rewards import AnyReward
from rewards.base import Reward, RewardError, Scores, WrapperSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Placed(WrapperSettings):
    """Another reward in this process, on its own device and in its own precision."""

    passes_gradient: ClassVar[bool] = True
    kind: Literal["placed"] = Field("placed", description="another reward on its own device")
    reward: AnyReward = Field(description="reward to place: {kind: ...}")
    device: str | None = Field(None, description="device: cpu, cuda, cuda:1 or mps; null = the training device")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="autocast of the reward's networks; float32 = none; weights keep the dtype they are loaded in",
    )

    @field_validator("device")
    @classmethod
    def _device(cls, device: str | None) -> str | None:
        if device is not None and (wrong := malformed(device)):
            raise ValueError(wrong)
        return device

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Build it there.

        Raises:
            RewardError: there is no such device.
        """
        import torch

        if self.device is not None and (wrong := unusable(self.device)):
            raise RewardError(f"reward 'placed': device: {wrong}")
        place = torch.device(self.device or device)
        inner = self.reward.build(place)
        dtype = getattr(torch, self.dtype)

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Scores:
            moved = media.to(place)
            with torch.autocast(place.type, dtype, enabled=self.dtype != "float32"):
                return inner(moved, prompts, group, inputs)

        return replace(inner, function=function)
