"""Images of any size -> the input of a vision tower: tensor operations, with gradients to the pixels.

Three families, which upstream code keeps apart and so must we:

* Pillow on 8-bit images (OpenAI's and open_clip's transform, transformers' processors, ImageReward): bicubic with
  antialiasing, width before height, each rounded to 1/255 and cut to [0, 1]. ``eight_bit=True`` computes the same
  numbers; the gradient passes the rounding as if it were not there. (Pillow 13 takes the height first for some shapes:
  then a few 1/255 here and there.)
* torchvision on float tensors (HPSv2, VLM-RMs): bicubic, neither rounded nor cut. torchvision antialiases tensors since
  0.17 and did not before, so published scores of the two differ in the third decimal: ``antialias`` chooses.
* torchvision on 8-bit tensors (Qwen's reading of videos): as on floats, then rounded to 1/255 and cut, once.
  ``eight_bit="tensor"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.base import RewardError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DENSE = 1 << 22
"""Weights of one axis that are multiplied as a matrix; more are sparse."""
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop or pad, normalise.

    Args:
        resize: (height, width) of the model; with ``fit="shorter"`` or ``"longest"`` the first number is the side.
        fit: shorter = shorter side to size | longest = longest side to size | exact = both sides, shape not kept |
            none = as it is.
        crop: (height, width) cut from the middle (zeros around what is smaller), or None.
        pad: whether what is smaller than ``resize`` gets black borders, before normalising.
        middle: how a crop's offset is rounded: down (transformers) | even (torchvision, to the nearest even half).
        eight_bit: Pillow's rounding to 1/255, of what is to be resized and after each axis, none beyond [0, 1];
            tensor = torchvision's of 8-bit tensors, of what is to be resized and after both axes.
        antialias: whether shrinking averages; Pillow always does.
    """

    resize: tuple[int, int]
    fit: Literal["shorter", "longest", "exact", "none"] = "shorter"
    crop: tuple[int, int] | None = None
    pad: bool = False
    middle: Literal["down", "even"] = "even"
    eight_bit: bool | Literal["tensor"] = True
    antialias: bool = True
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD

    @classmethod
    def cropped(cls, size: int) -> Preprocess:
        """OpenAI's, open_clip's and ImageReward's: shorter side to ``size`` by Pillow, middle square."""
        return cls((size, size), "shorter", crop=(size, size))

    @classmethod
    def padded(cls, size: int, antialias: bool = True) -> Preprocess:
        """HPSv2's: longest side to ``size`` on float tensors, black borders to a square."""
        return cls((size, size), "longest", pad=True, eight_bit=False, antialias=antialias)

    @classmethod
    def squashed(cls, size: int, antialias: bool = True) -> Preprocess:
        """VLM-RMs': both sides to ``size`` on float tensors."""
        return cls((size, size), "exact", eight_bit=False, antialias=antialias)

    @classmethod
    def of_processor(cls, settings: Any) -> Preprocess:
        """Settings of one of transformers' CLIP image processors."""
        size = settings.size
        side = size.get("shortest_edge")
        target = (side, side) if side else (size["height"], size["width"])
        fit: Any = ("shorter" if side else "exact") if settings.do_resize else "none"
        crop = (settings.crop_size["height"], settings.crop_size["width"]) if settings.do_center_crop else None
        return cls(target, fit, crop, middle="down", mean=tuple(settings.image_mean), std=tuple(settings.image_std))

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1] -> ``[N, 3, h, w]`` float32, normalised.

        Raises:
            RewardError: a side would vanish.
        """
        target = self.target(*images.shape[-2:])
        window = self._window(target)
        images = resized(images.float(), target, self.antialias, self.eight_bit, window)
        if self.crop and window is None:
            images = center_crop(images, *self.crop, self.middle)
        if self.pad:
            images = padded(images, *self.resize)
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std

    def _window(self, target: tuple[int, int]) -> Window | None:
        """The part of the resized image that the crop leaves: of a long thin one the rest is never computed."""
        if self.crop is None or self.eight_bit is not True or any(map(int.__lt__, target, self.crop)):
            return None
        starts = _starts(target, self.crop, self.middle)
        top, left = (slice(start, start + side) for start, side in zip(starts, self.crop, strict=True))
        return top, left

    def target(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing an image of ``height`` x ``width``."""
        size, short, long = self.resize[0], min(height, width), max(height, width)
        match self.fit:
            case "none":
                return height, width
            case "exact":
                return self.resize
            case "shorter":
                # ints are cut, not rounded: as torchvision and transformers do
                return (size, int(size * width / short)) if height <= width else (int(size * height / short), size)
        scale = size / float(long)
        found = round(height * scale), round(width * scale)
        if 0 in found:
            raise RewardError(f"an image of {height} x {width} is too thin to be shown at {size} x {size}")
        return found


def resized(
    images: Tensor,
    target: tuple[int, int],
    antialias: bool = True,
    eight_bit: bool | Literal["tensor"] = False,
    window: Window | None = None,
) -> Tensor:
    """Bicubic ``[N, 3, H, W]`` -> ``[N, 3, *target]``; with ``eight_bit`` bit for bit as Pillow or torchvision.

    Args:
        window: rows and columns of the result to compute; for Pillow's family alone.
    """
    rows, columns = window or (slice(0, target[0]), slice(0, target[1]))
    if images.shape[-2:] == target:
        return images if window is None else images[..., rows, columns]
    if not eight_bit:
        return F.interpolate(images, target, mode="bicubic", antialias=antialias, align_corners=False)
    pixels = _whole(images.double() * 255)
    if eight_bit == "tensor":
        floats = F.interpolate(pixels.float(), target, mode="bicubic", antialias=antialias, align_corners=False)
        return (_whole(floats, torch.round) / 255).to(images.dtype)
    pixels = _along_width(pixels, target[1], columns)
    return (_along_width(pixels.mT, target[0], rows).mT / 255).to(images.dtype)


def _along_width(pixels: Tensor, target: int, window: slice) -> Tensor:
    """``[N, 3, H, W]`` whole numbers -> ``[N, 3, H, window]`` of a width of ``target``, by Pillow's weights."""
    size = pixels.shape[-1]
    if target == size:
        return pixels[..., window]
    weights = _pillow_weights(size, target, window.start, window.stop).to(pixels.device)
    if weights.is_sparse:
        flat = torch.sparse.mm(weights, pixels.reshape(-1, size).T).T
        return _whole(flat.reshape(*pixels.shape[:-1], flat.shape[-1]))
    return _whole(pixels @ weights.T)


@lru_cache(8)
def _pillow_weights(size: int, target: int, start: int, stop: int) -> Tensor:
    """``[stop - start, size]`` float64: Pillow's bicubic coefficients, rounded to 22 bits as for 8-bit images.

    Only weights that may differ from 0 are computed; what is large is sparse. Sums of such numbers are exact in float64
    in any order, so that both forms give the same bits.
    """
    scale = size / target
    stretch = max(scale, 1.0)
    centre = (torch.arange(start, stop, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (centre - 2 * stretch + 0.5).floor().clamp(min=0)
    last = (centre + 2 * stretch + 0.5).floor().clamp(max=size)
    pixel = first + torch.arange(int((last - first).max()), dtype=torch.float64)
    x = ((pixel - centre + 0.5) / stretch).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = torch.where(pixel < last, weights, 0.0)
    weights = weights / weights.sum(1, keepdim=True) * 2**22
    weights = (weights.sign() * (weights.abs() + 0.5).floor()) / 2**22
    row = torch.arange(stop - start)[:, None].expand_as(pixel)
    place = torch.stack([row.flatten(), pixel.long().clamp(max=size - 1).flatten()])
    shape = stop - start, size
    whole = torch.sparse_coo_tensor(place, weights.flatten(), shape, check_invariants=True).coalesce()
    return whole if whole.numel() > DENSE else whole.to_dense()


def _half_up(pixels: Tensor) -> Tensor:
    return (pixels + 0.5).floor()


def _whole(pixels: Tensor, rounding: Callable[[Tensor], Tensor] = _half_up) -> Tensor:
    """To whole numbers of 0 .. 255, with the gradient of cutting alone."""
    cut = pixels.clamp(0, 255)
    return cut + (rounding(cut) - cut).detach()


def center_crop(images: Tensor, height: int, width: int, middle: Literal["down", "even"] = "down") -> Tensor:
    """The middle ``height x width``, with zeros around an image that is smaller."""
    extra = [max(0, height - images.shape[-2]), max(0, width - images.shape[-1])]
    if any(extra):
        top, left = (extra[0] + 1) // 2, (extra[1] + 1) // 2
        images = F.pad(images, (left, extra[1] - left, top, extra[0] - top))
    top, left = _starts(images.shape[-2:], (height, width), middle)
    return images[..., top : top + height, left : left + width]


def _starts(sides: Sequence[int], crop: Sequence[int], middle: Literal["down", "even"]) -> tuple[int, int]:
    """First row and column of the middle."""
    rest = sides[0] - crop[0], sides[1] - crop[1]
    top, left = (round(side / 2) if middle == "even" else side // 2 for side in rest)
    return top, left


def padded(images: Tensor, height: int, width: int) -> Tensor:
    """Black borders up to ``height x width``; an odd line goes to the bottom or right."""
    above, left = (height - images.shape[-2]) // 2, (width - images.shape[-1]) // 2
    below, right = height - images.shape[-2] - above, width - images.shape[-1] - left
    return F.pad(images, (left, right, above, below))
