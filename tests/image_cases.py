"""Parity cases of FLUX.2, the Qwen-Image editors and Sana, as in :mod:`adapter_cases`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tiny_flux2
import tiny_image
import tiny_sana
from adapter_cases import IMAGE, Case, packed
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from generators.base import Options


def pil(image: Tensor) -> Image.Image:
    """The only image of ``[1, 3, H, W]``."""
    return Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())


def shades(size: tuple[int, int]) -> Tensor:
    """Two images [2, 3, H, W] whose values are multiples of 1/255, as PIL holds them."""
    return (F.interpolate(IMAGE, size, mode="bilinear") * 255).round() / 255


def editor(name: str, **how: Any) -> Callable[[], Any]:
    """Builder of a Qwen-Image editor."""
    return lambda: tiny_image.qwen_image(f"QwenImage{name}Pipeline", **how)


def sana_euler() -> Any:
    """Sana with every branch of its network and a scheduler whose timesteps are fractions."""
    branches = {"out_channels": 16, "qk_norm": "rms_norm_across_heads", "interpolation_scale": 1, "timestep_scale": 0.5}
    return tiny_sana.sana("FlowMatchEulerDiscreteScheduler", **branches)


CASES = [
    Case(
        "flux2", "flux2", tiny_flux2.dev, call={"guidance_scale": 4.0, "max_sequence_length": 384},
        options=Options(size=(64, 64), text_length=384),
    ),
    Case(
        "flux2-wide", "flux2", lambda: tiny_flux2.dev(processor=True), call={"guidance_scale": 2.5},
        options=Options(size=(32, 96), embedded_guidance=2.5),
    ),
    Case(
        "flux2-klein", "flux2_klein", tiny_flux2.klein, call={"guidance_scale": 1.0, "max_sequence_length": 96},
        options=Options(size=(96, 64), text_length=96),
    ),
    Case("flux2-klein-cfg", "flux2_klein", tiny_flux2.klein, guidance=4.0, call={"guidance_scale": 4.0}),
    Case(
        "flux2-klein-distilled", "flux2_klein", lambda: tiny_flux2.klein(distilled=True),
        call={"guidance_scale": 4.0, "max_sequence_length": 96}, options=Options(size=(64, 64), text_length=96),
    ),
    Case(
        "flux2-edit", "flux2_edit", tiny_flux2.dev, call={"guidance_scale": 2.5, "max_sequence_length": 384},
        inputs={"image": shades((64, 64))}, single=True,
        options=Options(size=(64, 64), text_length=384, embedded_guidance=2.5),
    ),
    Case(
        "flux2-klein-edit-cfg", "flux2_klein_edit", tiny_flux2.klein, guidance=4.0,
        call={"guidance_scale": 4.0, "max_sequence_length": 96}, inputs={"image": shades((64, 96))}, single=True,
        options=Options(size=(64, 96), text_length=96),
    ),
    Case(
        "qwen-edit", "qwen_image_edit", editor("Edit"), call={"true_cfg_scale": 1.0}, latents=packed,
        inputs={"image": shades((64, 64))}, single=True,
    ),
    Case(
        "qwen-edit-cfg", "qwen_image_edit", editor("Edit"), guidance=4.0, latents=packed,
        call={"true_cfg_scale": 4.0, "negative_prompt": "blurry"}, single=True,
        inputs={"image": shades((32, 96))}, options=Options(size=(32, 96), negative_prompt="blurry"),
    ),
    Case(
        "qwen-edit-plus", "qwen_image_edit_plus", editor("EditPlus"), call={"true_cfg_scale": 1.0}, latents=packed,
        inputs={"image": shades((96, 64))}, options=Options(size=(96, 64)), single=True,
    ),
    Case(
        "qwen-edit-plus-cfg", "qwen_image_edit_plus", editor("EditPlus"), guidance=4.0, latents=packed,
        call={"true_cfg_scale": 4.0, "negative_prompt": " "}, single=True,
        inputs={"image": shades((64, 64))}, options=Options(size=(64, 64), negative_prompt=" "),
    ),
    Case(
        "qwen-edit-2511", "qwen_image_edit_plus", editor("EditPlus", zero_cond_t=True), guidance=4.0, latents=packed,
        call={"true_cfg_scale": 4.0, "negative_prompt": " "}, single=True,
        inputs={"image": shades((64, 64))}, options=Options(size=(64, 64), negative_prompt=" "),
    ),
    Case(
        "sana", "sana", tiny_sana.sana, call={"guidance_scale": 1.0, "use_resolution_binning": False}, solver="dpm2",
    ),
    Case(
        "sana-cfg", "sana", tiny_sana.sana, guidance=4.5, solver="dpm2",
        call={"guidance_scale": 4.5, "negative_prompt": "blurry", "use_resolution_binning": False},
        options=Options(size=(32, 96), negative_prompt="blurry"),
    ),
    Case(
        "sana-euler", "sana", sana_euler, options=Options(size=(64, 32), text_length=60),
        call={"guidance_scale": 1.0, "use_resolution_binning": False, "max_sequence_length": 60},
    ),
    Case(
        "sana-euler-cfg", "sana", sana_euler, guidance=3.0,
        call={"guidance_scale": 3.0, "use_resolution_binning": False},
    ),
    Case(
        "sana-sprint", "sana_sprint", tiny_sana.sprint, steps=1,
        call={"guidance_scale": 4.5, "use_resolution_binning": False, "intermediate_timesteps": None},
    ),
    Case(
        "sana-sprint-wide", "sana_sprint", tiny_sana.sprint, steps=1,
        options=Options(size=(32, 96), embedded_guidance=2.0, text_length=60),
        call={
            "guidance_scale": 2.0, "use_resolution_binning": False, "intermediate_timesteps": None,
            "max_sequence_length": 60, "max_timesteps": math.pi / 2,  # its default is a time beyond 1 by 4e-6
        },
    ),
]  # fmt: skip
