"""Trains the world's autoencoders: an `AutoencoderKL` of 64x64 images, an `AutoencoderKLWan` of videos."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from align.worlds.train_common import Log, cosine, optimizer, to_pixels
from generators import codec

CHANNELS = (16, 32, 32, 64)
LATENT_CHANNELS = 8
LATENT_NOISE = 0.6  # relative to scaled latents, whose spread is 1
Autoencoder: TypeAlias = AutoencoderKL | AutoencoderKLWan


@dataclass(frozen=True)
class Stages:
    """Values that change during a training; times are shares of it.

    Args:
        lr: the highest learning rate; weights before Wan's norms learn nothing at twice the one for videos.
        kl: from when until when the weight of KL rises: first tell everything, then shortly.
        most_kl: what it rises to, per latent dimension. With 3e-4 on images noise of a third of the latents' spread
            destroyed them. A video has twice as many latent dimensions for a pixel as an image.
        blurred: weight of `blurred_loss`, and until when it is the only one.
        frames: (until when, frames in a row of a video): what a frame looks like is learned at a fraction of the cost.
    """

    lr: float
    kl: tuple[float, float]
    most_kl: float
    blurred: tuple[float, float] = (0.0, 0.0)
    frames: tuple[tuple[float, int], ...] = ()

    def last(self) -> Stages:
        """As it is at the end of a training, all the time."""
        return replace(self, kl=(-1.0, 0.0), blurred=(self.blurred[0], 0.0), frames=())

    def kl_weight(self, done: float) -> float:
        """The weight of KL per latent dimension."""
        start, end = self.kl
        return self.most_kl * min(max((done - start) / (end - start), 0.0), 1.0)

    def loss(self, out: torch.Tensor, x: torch.Tensor, done: float) -> torch.Tensor:
        """How far reconstructions are from what they should be."""
        weight, until = self.blurred
        blurred = weight * blurred_loss(out, x) if weight else x.new_zeros(())
        return blurred if done < until else blurred + reconstruction_loss(out, x)

    def part(self, x: torch.Tensor, done: float, rng: np.random.Generator) -> torch.Tensor:
        """Up to four windows of each video [n, 3, F, h, w], as many frames long as it is time for; or all of `x`."""
        length = next((n for until, n in self.frames if done < until), None)
        if length is None:
            return x
        starts = rng.permutation(x.shape[2] - length + 1)[: min(4, x.shape[2] // length)]
        return torch.cat([x[:, :, i : i + length] for i in starts.tolist()])


IMAGES = Stages(lr=2e-3, kl=(0.0, 0.6), most_kl=5e-2)
VIDEOS = Stages(lr=1e-3, kl=(0.3, 0.8), most_kl=8e-3, blurred=(1.0, 0.15), frames=((0.5, 1), (0.9, 5)))


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


def new_video_vae() -> AutoencoderKLWan:
    """An untrained autoencoder of videos, 4 times smaller on each side and twice in time; with 8 times shapes blurred.

    A first patch of 2x2 pixels, as Wan 2.2 has, keeps the convolutions in 3D small. It begins with little noise on its
    latents (with as much as an untrained one has it learned to say nothing) and without looking back in time.
    """
    vae = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=20,
        dim_mult=[1, 3],
        num_res_blocks=1,
        temperal_downsample=[True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        z_dim=LATENT_CHANNELS,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                looks_back = module.kernel_size == (3, 3, 3)
                seen = module.weight[0, :, -1] if looks_back else module.weight[0]
                torch.nn.init.normal_(module.weight, std=seen.numel() ** -0.5)
                if looks_back:
                    module.weight[:, :, :-1] = 0.0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0  # the logarithm of the variance
    return vae


def reconstruction_loss(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences to the right and down, four times as heavy on and around objects.

    Both are [n, 3, h, w] or [n, 3, F, h, w] in [-1, 1]; the top left pixel is always background.
    """
    out, x, near = near_objects(out, x)
    weight = 1 + 3 * near
    error = out - x
    edges = (weight[..., 1:] * error.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    return (weight * error.abs()).mean() + 0.5 * edges


def blurred_loss(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Squares, ten times as heavy on and around objects: L1 is long content with images that leave them out."""
    out, x, near = near_objects(out, x)
    return ((1 + 9 * near) * (out - x) ** 2).mean()


def near_objects(out: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both as images [n, 3, h, w], and 1 on and around the objects of `x`, else 0, [n, 1, h, w]."""
    if x.ndim == 5:
        out, x = (video.transpose(1, 2).flatten(0, 1) for video in (out, x))
    far = (x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1
    return out, x, F.max_pool2d(far.float(), 5, 1, 2)


def train_vae(
    vae: Autoencoder, images: np.ndarray, steps: int, batch: int, seed: int, log: Log, *, again: bool = False
) -> None:
    """Trains on uint8 [n, h, w, 3] or [n, F, h, w, 3] and notes the latents' mean and spread in its settings.

    Args:
        again: it was trained before, so everything is from the start as it was at the end.
    """
    torch.manual_seed(seed)
    set_layout(vae.train(), channels_last=True)
    stages = IMAGES if images.ndim == 4 else VIDEOS
    stages = stages.last() if again else stages
    opt = optimizer(vae.parameters(), stages.lr)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        done = step / steps
        x = stages.part(to_pixels(images[rng.integers(0, len(images), batch)]), done, rng)
        if step % 2:
            x = x.flip(-1)  # circles to crosses all look the same mirrored
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            out = unclamped(vae, posterior.sample())
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = stages.loss(out.float(), x, done) + stages.kl_weight(done) * kl
        cosine(opt, step, steps)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        log("vae", step, steps, loss=loss.item(), kl=kl.item())
    set_layout(vae, channels_last=False)
    vae.eval()
    z = raw_latents(vae, images[:2048])
    if isinstance(vae, AutoencoderKL):
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))
    else:
        mean = z.mean([0, 2, 3, 4])
        std = (z - mean.view(-1, 1, 1, 1)).std()  # over all channels: channels with little information are not blown up
        vae.register_to_config(latents_mean=rounded(mean), latents_std=rounded(std.expand(len(mean))))


def unclamped(vae: Autoencoder, raw: torch.Tensor) -> torch.Tensor:
    """`vae.decode` of raw latents before Wan's clamps it to [-1, 1], through which no gradient would pass."""
    parts: list[torch.Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda _module, _given, out: parts.append(out))
    vae.decode(raw)
    hook.remove()
    if raw.ndim == 4:
        return parts[0]
    return unpatchify(torch.cat(parts, 2), vae.config.patch_size)


def rounded(x: torch.Tensor) -> list[float]:
    """Its numbers with four digits after the point."""
    return [round(value, 4) for value in x.tolist()]


def set_layout(model: torch.nn.Module, channels_last: bool) -> None:
    """Lays the weights of convolutions out with their channels last, which a CPU computes faster, or as usual."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    for p in model.parameters():
        p.data = p.data.contiguous(memory_format=formats.get(p.ndim, torch.contiguous_format))


def harden_decoder(vae: Autoencoder, images: np.ndarray, steps: int, batch: int, seed: int, log: Log) -> None:
    """Trains the decoder alone on latents with noise of up to LATENT_NOISE: a generator's latents are never exact."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    latents = encode(vae, images)
    mean, std = codec.statistics(vae, latents.ndim, latents.device)
    vae.decoder.train()
    set_layout(vae.decoder, channels_last=True)
    opt = optimizer(vae.decoder.parameters(), lr=1e-3)
    for step in range(steps):
        rows = rng.integers(0, len(images), batch)
        x, z = to_pixels(images[rows]), latents[rows]
        z = z + LATENT_NOISE * torch.rand(batch, *[1] * (z.ndim - 1)) * torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16):
            out = unclamped(vae, z * std + mean)
        loss = reconstruction_loss(out.float(), x)
        cosine(opt, step, steps)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        opt.step()
        log("decoder", step, steps, loss=loss.item())
    set_layout(vae.decoder, channels_last=False)
    vae.decoder.eval()


@torch.no_grad()
def raw_latents(vae: Autoencoder, images: np.ndarray, batch: int = 16) -> torch.Tensor:
    """`encode` without the scale: the posterior's means, whatever the settings say of their spread."""
    means = [vae.encode(to_pixels(images[i : i + batch])).latent_dist.mean for i in range(0, len(images), batch)]
    return torch.cat(means)


@torch.no_grad()
def encode(vae: Autoencoder, images: np.ndarray, batch: int = 16) -> torch.Tensor:
    """The scaled latents of uint8 images or videos, [n, 8, h / 8, w / 8] or [n, 8, F', h / 4, w / 4].

    They are the posterior's means.
    """
    z = raw_latents(vae, images, batch)
    mean, std = codec.statistics(vae, z.ndim, z.device)
    return (z - mean) / std


@torch.no_grad()
def decode(vae: Autoencoder, latents: torch.Tensor) -> np.ndarray:
    """Images, float32 [n, 3, h, w] in [0, 1], or videos [n, F, 3, h, w], of scaled latents."""
    return codec.decode(vae, latents).numpy()
