"""Optical flow without weights: coarse-to-fine Lucas-Kanade least squares, with gradients to the pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")


RADIUS, SIGMA = 7, 2.5
SMALLEST = 16
"""Shorter side below which the pyramid ends."""
STEADY = 1e-4
"""Added to the diagonal of the least squares, in squared brightness a pixel: what has no texture stays where it is."""


def optical_flow(first: Tensor, second: Tensor, steps: int = 3) -> Tensor:
    """Displacement of each pixel of ``first`` in ``second``: ``[N, 2, H, W]`` in pixels, x to the right and y down.

    Brightness is matched in Gaussian windows (standard deviation 2.5 pixels), ``steps`` Gauss-Newton steps a level,
    levels halving down to 16 pixels. Good for textured content and motion up to about an eighth of the image; what
    has no texture gets the flow of the coarser level, and none where that has none either.

    Args:
        first: ``[N, 3, H, W]`` in [0, 1]; so is ``second``.
    """
    bell = _bell(first)
    finest = tuple(images.float().mean(1, keepdim=True) for images in (first, second))
    pyramid = [finest]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * SMALLEST:
        pyramid.append(tuple(F.avg_pool2d(_blurred(level, _bell(first, 1.0)), 2) for level in pyramid[-1]))
    flow = torch.zeros_like(pyramid[-1][0]).repeat(1, 2, 1, 1)
    for a, b in reversed(pyramid):
        if flow.shape[-2:] != a.shape[-2:]:
            scale = torch.tensor([a.shape[-1] / flow.shape[-1], a.shape[-2] / flow.shape[-2]]).to(flow)
            flow = F.interpolate(flow, a.shape[-2:], mode="bilinear", align_corners=False) * scale.view(2, 1, 1)
        for _ in range(steps):
            seen = warped(torch.ones_like(b), flow, "zeros")  # pixels that left the image carry no information
            flow = _blurred(flow + _step(a, warped(b, flow), seen, bell), _bell(first, 1.0))
    return flow


def warped(images: Tensor, flow: Tensor, beyond: Literal["border", "zeros"] = "border") -> Tensor:
    """``images [N, C, H, W]`` looked up at x + flow, bilinear; ``beyond`` the border it continues, or is 0."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None]
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype)
    x, y = columns + flow[:, 0], rows + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=beyond, align_corners=False)


def _step(a: Tensor, b: Tensor, seen: Tensor, bell: Tensor) -> Tensor:
    """One Gauss-Newton step of the windowed least squares between two aligned brightness maps ``[N, 1, H, W]``."""
    gx, gy = _slopes(b)
    gap = a - b
    products = torch.cat([gx * gx, gx * gy, gy * gy, gx * gap, gy * gap], 1)
    xx, xy, yy, x, y = _blurred(products * seen, bell).split(1, 1)
    xx, yy = xx + STEADY, yy + STEADY
    return torch.cat([yy * x - xy * y, xx * y - xy * x], 1) / (xx * yy - xy * xy)


def _slopes(image: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return across, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def _blurred(maps: Tensor, bell: Tensor) -> Tensor:
    radius = len(bell) // 2
    flat = F.pad(maps.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(flat, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))[:, 0].unflatten(0, maps.shape[:2])


def _bell(like: Tensor, sigma: float = SIGMA) -> Tensor:
    reach = torch.arange(-RADIUS, RADIUS + 1, device=like.device, dtype=torch.float32)
    bell = (-(reach**2) / (2 * sigma**2)).exp()
    return bell / bell.sum()
