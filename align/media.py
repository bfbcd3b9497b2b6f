"""Image files in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from align.errors import DataError


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as ``[3, H, W]`` in [0, 1]; transparent parts become white.

    Args:
        size: (height, width) to crop and resize to; the file's own by default.

    Raises:
        DataError: there is no such file, or it is not an image that can be read to its end.
    """
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"no image {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} is not an image that can be read: {error}") from None
    if size is not None:
        flat = ImageOps.fit(flat, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(flat)).permute(2, 0, 1).float() / 255
