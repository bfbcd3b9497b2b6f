"""Structural similarity to the prompt's image (Wang et al. 2004), with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rewards.base import Reward, RewardError, RewardSettings
from rewards.frames import by_frame

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


class Ssim(RewardSettings):
    """Structural similarity (SSIM) to the prompt's image, averaged over a video's frames."""

    passes_gradient: ClassVar[bool] = True
    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    kind: Literal["ssim"] = Field("ssim", description="structural similarity to the prompt's image")
    chunk: int = Field(32, ge=1, description="images, or frames of videos, per call")
    frames: int | None = Field(None, ge=1, description="frames scored per video, evenly spaced; null = all")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Nothing to load."""

        def function(media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor) -> Tensor:
            return by_frame(media, lambda seen, of: ssim(seen, image[of.to(image.device)]), self.chunk, self.frames)

        return Reward("ssim", function, range=(-1.0, 1.0), differentiable=True, wants=("image",))


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """SSIM ``[N]`` of two ``[N, 3, H, W]`` in [0, 1]: mean over channels and over the windows that fit.

    Gaussian windows of 11 x 11, standard deviation 1.5, K1 0.01, K2 0.03, population variances; scikit-image's
    ``structural_similarity`` with ``gaussian_weights=True, use_sample_covariance=False, data_range=1``.

    Raises:
        RewardError: sizes differ, or a side is below 11.
    """
    import torch
    from torch.nn import functional as F

    if images.shape != references.shape or min(images.shape[-2:]) < WINDOW:
        sizes = f"{list(images.shape)} and {list(references.shape)}"
        raise RewardError(
            f"reward 'ssim': images should be equally large and {WINDOW} x {WINDOW} at least, got {sizes}"
        )
    x, y = images.float(), references.float()
    steps = torch.arange(WINDOW, device=x.device, dtype=torch.float32) - WINDOW // 2
    bell = (-(steps**2) / (2 * SIGMA**2)).exp()
    bell = bell / bell.sum()

    def mean(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)[:, None]
        blurred = F.conv2d(F.conv2d(flat, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))
        return blurred[:, 0].unflatten(0, values.shape[:2])

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    luminance = (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1)
    return (luminance * (2 * cov + C2) / (var_x + var_y + C2)).mean((1, 2, 3))
