"""A reward on noised latents: a small network on ``(x_t, t, prompt)``, for guidance and pruning without decoding.

It is conditioned on the time itself, not on a step's number, so any schedule will do, and it must be trained on noised
latents: one of clean latents misleads guidance (Flow-NRG, arXiv 2501.13918, table 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from alignflow.files import tensor_files
from alignflow.paths import expanded
from rewards.base import RewardError
from rewards.networks.clip import Clip
from rewards.networks.state_dicts import check_keys, read_state_dict, skeleton
from rewards.training.folder import read_manifest
from rewards.training.scorer import load_backbone
from rewards.training.settings import Backbone

FORMAT: Literal["alignflow-latent-reward/1"] = "alignflow-latent-reward/1"
FREQUENCIES = 16


def time_features(t: Tensor) -> Tensor:
    """``t [n]`` -> ``[n, 2 FREQUENCIES]``: sines and cosines at periods from 2 down to 2^-5 or so."""
    rates = math.pi * torch.exp(torch.linspace(0, math.log(64), FREQUENCIES, device=t.device))
    return torch.cat([(t[:, None] * rates).sin(), (t[:, None] * rates).cos()], -1)


class Block(nn.Module):
    """Normalise, shift and scale by time and prompt, convolve, at half the size."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.modulate = nn.Linear(condition, 2 * width)
        self.inner, self.down = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition)[..., None, None].chunk(2, 1)
        return self.down(x + self.inner(F.silu(self.norm(x) * (1 + scale) + shift)))


class LatentNet(nn.Module):
    """``(x_t [n, C, H, W] or [n, C, F, H, W], t [n], text [n, D]) -> [n]``, in deviations from the mean score.

    Args:
        channels: C.
        text: D.
        width: of the convolutions, a multiple of 8.
        blocks: halvings of the size.
        motion: frames are seen beside their neighbours; without, each by itself.
    """

    def __init__(self, channels: int, text: int, width: int, blocks: int, motion: bool = False) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(2 * FREQUENCIES + text, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, width) for _ in range(blocks))
        across = partial(nn.Conv3d, width, width, (3, 1, 1), padding=(1, 0, 0))
        self.across = nn.ModuleList(across() for _ in range(blocks if motion else 0))
        self.leave = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        frames = x.movedim(2, 1) if x.ndim == 5 else x[:, None]
        condition = self.condition(torch.cat([time_features(t), text * text.shape[-1] ** 0.5], -1))
        each = condition.repeat_interleave(frames.shape[1], 0)
        h = self.enter(frames.flatten(0, 1))
        for block, across in zip_longest(self.blocks, self.across):
            h = block(h, each)
            if across is not None:
                clips = h.unflatten(0, frames.shape[:2])
                h = h + F.silu(across(clips.movedim(2, 1))).movedim(1, 2).flatten(0, 1)
        pooled = h.mean((-2, -1)).unflatten(0, frames.shape[:2]).mean(1)
        return self.leave(torch.cat([pooled, condition], -1))[:, 0]


class Manifest(BaseModel):
    """Contents of ``latent.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["alignflow-latent-reward/1"] = Field(FORMAT, description="version of the folder format")
    text: Backbone = Field(description="CLIP that encodes the prompts")
    generator: str = Field("", description="generator whose latents it was trained on")
    channels: int = Field(ge=1)
    text_width: int = Field(ge=1)
    width: int = Field(64, ge=8, multiple_of=8)
    blocks: int = Field(3, ge=1)
    motion: bool = Field(False, description="whether neighbouring frames are processed together")
    mean: float = Field(0.0, description="mean of the training scores")
    std: float = Field(1.0, gt=0, description="standard deviation of the training scores")

    def build(self) -> LatentNet:
        """An untrained network."""
        return LatentNet(self.channels, self.text_width, self.width, self.blocks, self.motion)


class LatentReward:
    """``(x_t [n, ...], t [n], prompts) -> [n]`` in the units of the scores, with gradient to ``x_t``."""

    def __init__(self, manifest: Manifest, net: LatentNet, clip: Clip) -> None:
        self.manifest, self.net, self.clip = manifest, net, clip
        self._known: dict[str, Tensor] = {}

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Features ``[n, D]``; every prompt is read once."""
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if fresh:
            self._known.update(zip(fresh, self.clip.text_features(fresh, 64), strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])

    def __call__(self, x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        if x.shape[1] != self.manifest.channels:
            raise RewardError(
                f"this latent reward was trained on {self.manifest.channels} channels ({self.manifest.generator}), "
                f"not on {x.shape[1]}"
            )
        device = next(self.net.parameters()).device
        value = self.net(x.to(device).float(), t.to(device).float(), self.text(prompts).to(device))
        return (self.manifest.mean + self.manifest.std * value).to(x.device)


def save(folder: Path, reward: LatentReward) -> None:
    """Write ``latent.json`` and ``latent.safetensors`` into a folder that exists."""
    state = {name: value.detach().cpu().contiguous() for name, value in reward.net.state_dict().items()}
    tensor_files.save(folder / "latent.safetensors", state)
    (folder / "latent.json").write_text(reward.manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load(path: str | Path, device: torch.device | str = "cpu") -> LatentReward:
    """The reward that :func:`save` wrote; raises RewardError if it does not exist or does not fit."""
    folder = expanded(path, RewardError)
    manifest = read_manifest(folder / "latent.json", Manifest, FORMAT, "alignflow reward train")
    state = read_state_dict(folder / "latent.safetensors")
    check_keys(state, skeleton(manifest.build), str(folder / "latent.safetensors"), "this latent reward")
    net = manifest.build()
    net.load_state_dict(state)
    clip = load_backbone(manifest.text, device)
    return LatentReward(manifest, net.requires_grad_(False).eval().to(device), clip)
