"""The adapters' parity cases: a tiny pipeline of the real classes, and what its own call is told.

One entry per pipeline and guidance mode in :data:`CASES`; ``tests/test_adapters.py`` runs every check over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tiny_image
import tiny_video
import torch
from torch import Tensor

from align.policy.lora import NETWORK, add_lora
from generators.base import Generator, Options
from generators.codec import pack

PROMPTS = ["a red circle", "two blue squares on a white background"]


def same(generator: Generator, noise: Tensor) -> Tensor:
    """Latents that the pipeline takes as they are."""
    return noise


def packed(generator: Generator, noise: Tensor) -> Tensor:
    """Latents as tokens of 2 x 2 patches."""
    return pack(noise)


SQUARE = Options(size=(64, 64))


@dataclass(frozen=True)
class Case:
    """One way to call one pipeline.

    Args:
        kind: the adapter's file in ``generators/``.
        build: makes the pipeline, the same weights every time.
        guidance: our guidance scale (1 = none).
        call: what the pipeline is told besides prompt, size, steps, and latents.
        options: what our generator is told.
        latents: our noise -> the pipeline's ``latents`` argument.
        inputs: name -> our tensors [B, C, H, W] in [0, 1], one per prompt.
        steps: of either sampler; one where the pipeline puts fresh noise between two.
        solver: our kind of step, where the pipeline's scheduler takes another than Euler's.
        single: the pipeline takes one prompt a call, and its images from PIL.
    """

    name: str
    kind: str
    build: Callable[[], Any]
    guidance: float = 1.0
    call: dict[str, Any] = field(default_factory=dict)
    options: Options = SQUARE
    latents: Callable[[Generator, Tensor], Tensor] = same
    inputs: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 3
    solver: str = "ode"
    single: bool = False


def images(channels: int) -> Tensor:
    """Two smooth images [2, channels, 64, 64] in [0, 1]."""
    source = torch.Generator().manual_seed(7)
    return torch.nn.functional.interpolate(torch.rand(2, channels, 8, 8, generator=source), (64, 64), mode="bilinear")


def moved(
    generator: Generator, targets: str | Sequence[str] | None = None, parts: Sequence[str] = NETWORK
) -> list[tuple[str, torch.nn.Parameter]]:
    """LoRA parameters, far from where they start."""
    parameters = add_lora(generator, 4, 8, targets, parts=parts)
    source = torch.Generator().manual_seed(1)
    for _, value in parameters:
        value.data += 0.2 * torch.randn(value.shape, generator=source)
    return parameters


VIDEO = Options(size=(32, 48), frames=9, text_length=40)
IMAGE, HOLE = images(3), (images(1) > 0.5).float()
CASES = [
    Case("flux-dev", "flux", tiny_image.flux, call={"guidance_scale": 3.5}, latents=packed),
    Case(
        "flux-dev-wide", "flux", tiny_image.flux, call={"guidance_scale": 2.0, "max_sequence_length": 48},
        latents=packed, options=Options(size=(32, 96), embedded_guidance=2.0, text_length=48),
    ),
    Case(
        "flux-dev-true-cfg", "flux", tiny_image.flux, guidance=3.0, latents=packed,
        call={"guidance_scale": 3.5, "true_cfg_scale": 3.0, "negative_prompt": ["blurry", "blurry"]},
        options=Options(size=(64, 64), negative_prompt="blurry"),
    ),
    Case("flux-schnell", "flux", lambda: tiny_image.flux(guidance_embeds=False), latents=packed),
    Case(
        "flux-kontext", "flux_kontext", lambda: tiny_image.flux("FluxKontextPipeline"), latents=packed,
        call={"guidance_scale": 2.5, "_auto_resize": False, "max_area": 64 * 64}, inputs={"image": IMAGE},
        options=Options(size=(64, 64), embedded_guidance=2.5),
    ),
    Case(
        "flux-kontext-true-cfg", "flux_kontext", lambda: tiny_image.flux("FluxKontextPipeline"), guidance=2.0,
        call={"true_cfg_scale": 2.0, "negative_prompt": ["", ""], "_auto_resize": False, "max_area": 64 * 64},
        latents=packed, inputs={"image": IMAGE},
    ),
    Case("flux-fill", "flux_fill", tiny_image.flux_fill, latents=packed, inputs={"image": IMAGE, "mask": HOLE}),
    Case("qwen-image", "qwen_image", tiny_image.qwen_image, call={"true_cfg_scale": 1.0}, latents=packed),
    Case(
        "qwen-image-cfg", "qwen_image", tiny_image.qwen_image, guidance=4.0, latents=packed,
        call={"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]},
        options=Options(size=(32, 64), negative_prompt=" "),
    ),
    Case("z-image", "z_image", tiny_image.z_image, call={"guidance_scale": 0.0}),
    Case("z-image-cfg", "z_image", tiny_image.z_image, guidance=4.0, call={"guidance_scale": 3.0}),
    Case("wan21", "wan", tiny_video.wan, call={"guidance_scale": 1.0, "max_sequence_length": 40}, options=VIDEO),
    Case(
        "wan21-cfg", "wan", tiny_video.wan, guidance=5.0, call={"guidance_scale": 5.0, "max_sequence_length": 40},
        options=VIDEO,
    ),
    Case(
        "wan22-two-experts", "wan", lambda: tiny_video.wan(2), guidance=3.0,
        call={"guidance_scale": 3.0, "max_sequence_length": 40}, options=VIDEO,
    ),
    Case(
        "wan22-times-per-token", "wan", lambda: tiny_video.wan(expand_timesteps=True), guidance=3.0,
        call={"guidance_scale": 3.0, "max_sequence_length": 40}, options=VIDEO,
    ),
]  # fmt: skip
