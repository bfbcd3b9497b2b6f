"""Latent code shared by the adapters: packing into tokens, encoding and decoding media with a VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VAE_PIXELS = 2**22  # coded at once: four images of a megapixel
VAE_PIXELS_CPU = 2**16  # what fits its cache: 16 images of 64 x 64, twice as fast as 192 at once


def in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """``function`` over at most ``size`` rows at a time, so a VAE's activations do not grow with the batch."""
    return torch.cat([function(part) for part in rows.split(max(1, size))])


def pack(x: Tensor) -> Tensor:
    """Latents ``[N, C, H, W]`` -> tokens of 2 x 2 patches ``[N, H/2 * W/2, 4 C]``, channel before row before column."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens ``[N, H/2 * W/2, 4 C]`` -> latents ``[N, C, H, W]``, the inverse of :func:`pack`."""
    n, _, c = tokens.shape
    x = tokens.view(n, height // 2, width // 2, c // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, height, width)


def statistics(vae: Any, ndim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(mean, spread) of a VAE's raw latents, to broadcast over ``ndim`` dimensions: raw = latents * spread + mean.

    Channel-wise where the VAE's settings or buffers name ``latents_mean`` and ``latents_std``, else its shift and
    scaling factor.
    """
    config, buffers = vae.config, dict(vae.named_buffers(recurse=False))
    mean, std = (getattr(config, name, None) or buffers.get(name) for name in ("latents_mean", "latents_std"))
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is None:
        mean, std = [getattr(config, "shift_factor", None) or 0.0], [1.0]
    shape = (1, -1, *[1] * (ndim - 2))
    mean, std = (torch.as_tensor(x, dtype=torch.float32, device=device).view(shape) for x in (mean, std))
    return mean, std / scale


def decode(vae: Any, latents: Tensor, **options: Any) -> Tensor:
    """Latents ``[N, C, H, W]`` or ``[N, C, F, H, W]`` -> media ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` in [0, 1]."""
    mean, std = statistics(vae, latents.ndim, latents.device)
    pixels_each = latents[0, 0].numel() * _ratio(vae)
    batch = _batch(latents.device, pixels_each)
    raw = latents.float() * std + mean
    pixels = in_chunks(lambda z: vae.decode(z.to(vae.dtype), return_dict=False, **options)[0], raw, batch)
    media = (pixels.float() / 2 + 0.5).clamp(0, 1)
    return media.transpose(1, 2) if media.ndim == 5 else media


def encode(vae: Any, media: Tensor) -> Tensor:
    """Media in [0, 1] -> latents, the inverse of :func:`decode`: the mode of the encoder's distribution."""
    pixels = (media * 2 - 1).to(vae.dtype)
    if pixels.ndim == 5:
        pixels = pixels.transpose(1, 2)

    def raw(x: Tensor) -> Tensor:
        out = vae.encode(x)
        return out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent

    latents = in_chunks(raw, pixels, _batch(media.device, pixels[0, 0].numel())).float()
    mean, std = statistics(vae, latents.ndim, latents.device)
    return (latents - mean) / std


def _ratio(vae: Any) -> int:
    """Pixels of one latent cell, about: only the chunk size depends on it."""
    return int(getattr(vae, "spatial_compression_ratio", 8)) ** 2


def _batch(device: torch.device, pixels_each: int) -> int:
    return (VAE_PIXELS_CPU if device.type == "cpu" else VAE_PIXELS) // max(1, pixels_each)
