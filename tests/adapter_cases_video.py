"""The video adapters' parity cases, see :mod:`adapter_cases`."""

from __future__ import annotations

import tiny_hunyuan
import tiny_video
from adapter_cases import Case, images
from torch import Tensor

from generators.base import Generator, Options


def tokens(generator: Generator, noise: Tensor) -> Tensor:
    """Latents as one token each."""
    return noise.flatten(2).transpose(1, 2)


def frames_first(generator: Generator, noise: Tensor) -> Tensor:
    """Latents [N, F, C, H, W]."""
    return noise.transpose(1, 2)


VIDEO = Options(size=(32, 48), frames=9, text_length=40)
WIDE = Options(size=(32, 64), frames=5)


def bytes_of(height: int, width: int) -> dict:
    """Two smooth images that a file can hold exactly."""
    return {"image": (images(3)[..., :height, :width] * 255).round() / 255}


KINDS = ["wan", "hunyuan_video", "hunyuan_video15", "ltx", "mochi", "cogvideox"]  # those a config trains
CASES = [
    Case(
        "wan22-ti2v", "wan", lambda: tiny_video.wan(expand_timesteps=True, high_compression=True), guidance=3.0,
        call={"guidance_scale": 3.0, "max_sequence_length": 512}, options=WIDE,
    ),
    Case(
        "wan21-i2v", "wan_i2v", tiny_video.wan_i2v, call={"guidance_scale": 1.0}, single=True,
        inputs=bytes_of(32, 48), options=Options(size=(32, 48), frames=9),
    ),
    Case(
        "wan21-i2v-cfg", "wan_i2v", tiny_video.wan_i2v, guidance=5.0, single=True, inputs=bytes_of(32, 64),
        call={"guidance_scale": 5.0, "negative_prompt": "blurry"},
        options=Options(size=(32, 64), frames=5, negative_prompt="blurry"),
    ),
    Case(
        "wan22-i2v-two-experts", "wan_i2v", lambda: tiny_video.wan_i2v(2), guidance=3.0, single=True,
        call={"guidance_scale": 3.0, "max_sequence_length": 40}, inputs=bytes_of(32, 48), options=VIDEO,
    ),
    Case(
        "wan22-i2v-first-frame", "wan_i2v", lambda: tiny_video.wan_i2v(first_frame=True), single=True,
        call={"guidance_scale": 1.0}, inputs=bytes_of(32, 64), options=WIDE,
    ),
    Case(
        "wan22-i2v-first-frame-cfg", "wan_i2v", lambda: tiny_video.wan_i2v(first_frame=True), guidance=4.0,
        single=True, call={"guidance_scale": 4.0}, inputs=bytes_of(64, 64),
        options=Options(size=(64, 64), frames=9),
    ),
    Case(
        "hunyuan-video", "hunyuan_video", tiny_hunyuan.hunyuan_video, call={"guidance_scale": 6.0},
        options=Options(size=(32, 48), frames=9),
    ),
    Case(
        "hunyuan-video-told", "hunyuan_video", tiny_hunyuan.hunyuan_video, options=Options(
            size=(32, 64), frames=5, embedded_guidance=2.0, text_length=80
        ), call={"guidance_scale": 2.0, "max_sequence_length": 80},
    ),
    Case(
        "hunyuan-video-true-cfg", "hunyuan_video", tiny_hunyuan.hunyuan_video, guidance=3.0,
        call={"guidance_scale": 6.0, "true_cfg_scale": 3.0, "negative_prompt": ["blurry", "blurry"]},
        options=Options(size=(32, 32), frames=5, negative_prompt="blurry"),
    ),
    Case(
        "hunyuan-video-cfg", "hunyuan_video", lambda: tiny_hunyuan.hunyuan_video(guidance_embeds=False), guidance=4.0,
        call={"true_cfg_scale": 4.0, "negative_prompt": ["", ""]}, options=WIDE,
    ),
    Case(
        "ltx", "ltx", tiny_video.ltx, call={"guidance_scale": 1.0}, latents=tokens,
        options=Options(size=(32, 64), frames=17),
    ),
    Case(
        "ltx-cfg", "ltx", tiny_video.ltx, guidance=3.0, latents=tokens, options=Options(
            size=(64, 64), frames=9, text_length=40, negative_prompt="blurry", fps=8
        ), call={
            "guidance_scale": 3.0, "max_sequence_length": 40, "negative_prompt": ["blurry", "blurry"], "frame_rate": 8
        },
    ),
    Case(
        "ltx-cfg-rescaled", "ltx", lambda: tiny_video.ltx(told_time=True), guidance=4.0, latents=tokens,
        call={"guidance_scale": 4.0, "guidance_rescale": 0.7},
        options=Options(size=(64, 64), frames=9, guidance_rescale=0.7),
    ),
    Case(
        "mochi", "mochi", tiny_video.mochi, call={"guidance_scale": 1.0}, options=Options(size=(32, 48), frames=13),
    ),
    Case(
        "mochi-cfg", "mochi", tiny_video.mochi, guidance=4.5, call={
            "guidance_scale": 4.5, "max_sequence_length": 60, "negative_prompt": ["blurry", "blurry"]
        }, options=Options(size=(64, 48), frames=7, text_length=60, negative_prompt="blurry"),
    ),
    Case(
        "mochi-cfg-blank", "mochi", lambda: tiny_video.mochi(blank_empty=True), guidance=3.0,
        call={"guidance_scale": 3.0}, options=Options(size=(32, 32), frames=7),
    ),
    Case(
        "cogvideox", "cogvideox", tiny_video.cogvideox, call={"guidance_scale": 1.0, "max_sequence_length": 60},
        latents=frames_first, steps=4, options=Options(size=(48, 64), frames=9),
    ),
    Case(
        "cogvideox-cfg", "cogvideox", lambda: tiny_video.cogvideox(rotary=True), guidance=6.0, steps=5,
        call={"guidance_scale": 6.0, "max_sequence_length": 60, "negative_prompt": ["blurry", "blurry"]},
        latents=frames_first, options=Options(size=(32, 32), frames=13, negative_prompt="blurry"),
    ),
    Case(
        "cogvideox15-cfg", "cogvideox", lambda: tiny_video.cogvideox(rotary=True, frames_a_patch=2), guidance=3.0,
        call={"guidance_scale": 3.0, "max_sequence_length": 60}, latents=frames_first, steps=4,
        options=Options(size=(32, 64), frames=9),
    ),
    Case(
        "cogvideox15-whole", "cogvideox", lambda: tiny_video.cogvideox(rotary=True, frames_a_patch=2), steps=4,
        call={"guidance_scale": 1.0, "max_sequence_length": 60}, latents=frames_first,
        options=Options(size=(48, 32), frames=13),
    ),
    Case(
        "hunyuan-video15", "hunyuan_video15", tiny_hunyuan.hunyuan_video15, single=True,
        options=Options(size=(32, 48), frames=9),
    ),
    Case(
        "hunyuan-video15-cfg", "hunyuan_video15", lambda: tiny_hunyuan.hunyuan_video15(6.0), guidance=6.0,
        single=True, call={"negative_prompt": 'a sign "no"'},
        options=Options(size=(64, 32), frames=5, negative_prompt='a sign "no"'),
    ),
    Case(
        "hunyuan-video15-cfg-rescaled", "hunyuan_video15", lambda: tiny_hunyuan.hunyuan_video15(4.0, 0.5),
        guidance=4.0, single=True, options=Options(size=(32, 32), frames=5, guidance_rescale=0.5),
    ),
]  # fmt: skip
