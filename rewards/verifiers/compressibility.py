"""JPEG size of an image: a reward without weights, for smoke tests (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rewards.base import Reward, RewardSettings
from rewards.frames import by_frame
from rewards.rows import eight_bit

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Compressibility(RewardSettings):
    """JPEG size of an image in kilobytes, rewarded for being small or large; for smoke tests."""

    kind: Literal["compressibility"] = Field("compressibility", description="JPEG size")
    prefer: Literal["small", "large"] = Field(
        "small",
        description="small = negative size (DDPO's compressibility) | large = size (DDPO's incompressibility)",
    )
    quality: int = Field(95, ge=1, le=100, description="JPEG quality; DDPO uses 95")
    frames: int | None = Field(None, ge=1, description="frames scored per video, evenly spaced; null = all")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Nothing to load."""
        sign = -1.0 if self.prefer == "small" else 1.0

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            return sign * by_frame(media, lambda images, samples: kilobytes(images, self.quality), 1, self.frames)

        span = (float("-inf"), 0.0) if self.prefer == "small" else (0.0, float("inf"))
        return Reward("compressibility", function, range=span)


def kilobytes(images: Tensor, quality: int) -> Tensor:
    """``[N, 3, H, W]`` in [0, 1] -> ``[N]`` thousands of bytes of Pillow's JPEG."""
    from PIL import Image

    sizes = [len(_jpeg(Image.fromarray(pixels), quality)) / 1000 for pixels in eight_bit(images.nan_to_num())]
    return images.new_tensor(sizes, dtype=images.float().dtype) + 0 * images.float().mean((1, 2, 3))  # NaN stays NaN


def _jpeg(image: Any, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
