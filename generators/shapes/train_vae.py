"""Trains the world's `AutoencoderKL`: 64x64 pictures to 8x8 latents of 8 channels."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .train_common import Log, cosine, optimizer, to_pixels

CHANNELS = (16, 32, 32, 64)
LATENT_CHANNELS = 8
KL_WEIGHT = 5e-2  # per latent dimension; with 3e-4 noise of a third of the latents' spread destroyed the picture
KL_WARMUP = 0.6  # share of the training over which the weight rises: first tell everything, then shortly
LATENT_NOISE = 0.6  # of the scaled latents, whose spread is 1


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder in SD3's arrangement: no quant convolutions, 8 times smaller on each side."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def reconstruction_loss(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences to the right and down, four times as heavy on and around objects.

    Both are [n, 3, h, w] in [-1, 1]; the top left pixel is always background.
    """
    near = ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    weight = 1 + 3 * F.max_pool2d(near, 5, 1, 2)
    error = out - x
    edges = (weight[..., 1:] * error.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    return (weight * error.abs()).mean() + 0.5 * edges


def train_vae(images: np.ndarray, steps: int, batch: int, seed: int, log: Log) -> AutoencoderKL:
    """Trains on uint8 [n, 64, 64, 3] and sets scaling_factor and shift_factor from the latents' mean and spread."""
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    opt = optimizer(vae.parameters(), lr=2e-3)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        x = to_pixels(images[rng.integers(0, len(images), batch)])
        if step % 2:
            x = x.flip(-1)  # circles to crosses all look the same mirrored
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample()).sample
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        weight = KL_WEIGHT * min(1.0, (step + 1) / (KL_WARMUP * steps))
        loss = reconstruction_loss(out.float(), x) + weight * kl
        cosine(opt, step, steps)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        log("vae", step, steps, loss=loss.item(), kl=kl.item())
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    z = encode(vae, images[:2048])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))
    return vae


def harden_decoder(vae: AutoencoderKL, images: np.ndarray, steps: int, batch: int, seed: int, log: Log) -> None:
    """Trains the decoder alone on latents with noise of up to LATENT_NOISE: a generator's latents are never exact."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    latents, decoder = encode(vae, images), vae.decoder.to(memory_format=torch.channels_last).train()
    opt = optimizer(decoder.parameters(), lr=1e-3)
    for step in range(steps):
        rows = rng.integers(0, len(images), batch)
        x, z = to_pixels(images[rows]), latents[rows]
        z = z + LATENT_NOISE * torch.rand(batch, 1, 1, 1) * torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16):
            out = decoder(z / vae.config.scaling_factor + vae.config.shift_factor)
        loss = reconstruction_loss(out.float(), x)
        cosine(opt, step, steps)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        opt.step()
        log("decoder", step, steps, loss=loss.item())
    decoder.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 16) -> torch.Tensor:
    """The scaled latents [n, 8, 8, 8] of uint8 pictures [n, 64, 64, 3]: the posterior's means."""
    means = [vae.encode(to_pixels(images[i : i + batch])).latent_dist.mean for i in range(0, len(images), batch)]
    return (torch.cat(means) - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, batch: int = 128) -> np.ndarray:
    """Pictures, float32 [n, 3, 64, 64] in [0, 1], of scaled latents."""
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    out = [vae.decode(z[i : i + batch]).sample for i in range(0, len(z), batch)]
    return (torch.cat(out) / 2 + 0.5).clamp(0, 1).numpy()
