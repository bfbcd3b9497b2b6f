"""Sizes of the data in a run: tokens per sample, rows per pass, bytes per rollout."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.checking.architectures import Part, arguments, on_meta, parts_of

if TYPE_CHECKING:
    from align.config.model import GeneratorConfig
    from align.config.settings import Config

VIDEO = ("wan", "wan_i2v", "hunyuan_video", "hunyuan_video15", "ltx", "mochi", "cogvideox")
FRAMES = 81
TEXT = {"SD3Transformer2DModel": 256, "FluxTransformer2DModel": 512, "WanTransformer3DModel": 512}
"""Network class -> default number of text tokens; 256 for all others."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of the data of one process.

    Args:
        size: height and width in pixels.
        frames: 1 for images.
        image_tokens: tokens of one sample, source images of an editor included.
        width: features per token.
        sampled_rows: samples in a pass without gradient, both halves of guidance counted.
        decoded_rows: samples decoded at a time.
        trained_rows: samples in a pass with gradient, both halves of guidance counted.
        scored_rows: samples decoded and scored with gradient at a time.
        rollout_bytes: latents and trajectory that a rollout keeps on the card.
    """

    size: tuple[int, int]
    frames: int
    image_tokens: int
    text_tokens: int
    width: int
    sampled_rows: int
    decoded_rows: int
    trained_rows: int
    scored_rows: int
    rollout_bytes: float
    rollout_how: str


def shapes_of(config: Config, parts: dict[str, Part]) -> Shapes:
    """Sizes of a config's run on a pipeline of these networks."""
    name, settings = parts["transformer"].name, arguments(parts["transformer"])
    kind = config.generator.kind
    space, time = _compression(parts)
    patch = _patch(name, settings)
    video = kind in VIDEO
    frames = (config.generator.frames or FRAMES) if video else 1
    size = config.generator.size or ((480, 832) if video else _square(settings, space))
    time_steps = (frames - 1) // time + 1
    cells = time_steps * (size[0] // space) * (size[1] // space)
    images = 2 if kind.endswith(("_kontext", "_edit", "_edit_plus")) else 1
    text = config.generator.text_length or TEXT.get(name, 256)
    if name == "SD3Transformer2DModel":
        text = 77 + (text if "text_encoder_3" in parts else 1)
    channels = settings.get("out_channels") or settings.get("in_channels") or 16
    channels = channels // 4 if channels >= 64 else channels  # packed 2 x 2
    rollout, how = _rollout(config, cells * channels)
    return Shapes(
        size=size,
        frames=frames,
        image_tokens=max(1, cells // patch) * images,
        text_tokens=text,
        width=_width(settings),
        sampled_rows=_sampled(config),
        decoded_rows=getattr(config.rollout, "decode_chunk", 1),
        trained_rows=_trained(config, guided=bool(config.recipe.needs)),
        scored_rows=_trained(config, guided=False) if "reward_gradient" in config.recipe.needs else 0,
        rollout_bytes=rollout,
        rollout_how=how,
    )


def native_size(generator: GeneratorConfig) -> tuple[int, int] | None:
    """(height, width) of a model's samples by default; None where that is not known before it is loaded."""
    from generators.base import Generator
    from generators.load import adapter

    parts = None if ":" in generator.kind else parts_of(generator.kind, generator.path)
    if parts is None or "transformer" not in parts or adapter(generator.kind).native_size is not Generator.native_size:
        return None
    return _square(arguments(parts["transformer"]), _compression(parts)[0])


def _square(settings: dict[str, Any], space: int) -> tuple[int, int]:
    """The default size of diffusers' image pipelines, most of which take it from the network."""
    side = (settings.get("sample_size") if isinstance(settings.get("sample_size"), int) else None) or 128
    return side * space, side * space


def _compression(parts: dict[str, Part]) -> tuple[int, int]:
    """Pixels per side, and frames, of one latent cell."""
    if "vae" not in parts:
        return 8, 4
    vae, settings = on_meta(parts["vae"]), arguments(parts["vae"])
    widths = settings.get("block_out_channels")
    known = settings.get("scale_factor_spatial") or getattr(vae, "spatial_compression_ratio", None)
    space = known or (2 ** (len(widths) - 1) if widths else 8)
    time = settings.get("scale_factor_temporal") or getattr(vae, "temporal_compression_ratio", None) or 4
    return int(space), int(time)


def _patch(name: str, settings: dict[str, Any]) -> int:
    """Latent cells per token."""
    if name.startswith(("Flux", "QwenImage")):
        return 4  # packed by the pipeline, whatever the network calls its patch
    patch = settings.get("patch_size") or settings.get("all_patch_size") or 2
    if isinstance(patch, int):
        return patch**2
    return math.prod(patch) if len(patch) > 1 else patch[0] ** 2


def _width(settings: dict[str, Any]) -> int:
    """Features per token."""
    heads, each = settings.get("num_attention_heads"), settings.get("attention_head_dim")
    return heads * each if heads and each else settings.get("dim") or settings.get("hidden_size") or 1024


def _sampled(config: Config) -> int:
    """Most rows of a network call without gradient, of the rollout's size; an evaluation of another counts by area."""
    chunk = getattr(config.rollout, "chunk", 1)
    samples = config.rollout.prompts * config.rollout.group
    guidance = getattr(getattr(config.rollout, "sampler", None), "guidance", 1.0)
    tested = min(config.evaluate.chunk, config.evaluate.prompts) if config.prompts.heldout else 0
    larger, size = config.evaluate.size, config.generator.size
    area = math.prod(larger) / math.prod(size) if larger and size else 1.0
    return max(
        min(chunk, samples) * (1 if guidance == 1.0 else 2),
        math.ceil(tested * area) * (1 if config.evaluate.sampler.guidance == 1.0 else 2),
    )


def _trained(config: Config, *, guided: bool) -> int:
    """Largest number of rows, over learners, of a network pass with gradient; a pair is two rows.

    Args:
        guided: whether to count the guidance of sampled steps, which doubles the policy's rows.
    """
    doubled = guided and getattr(getattr(config.rollout, "sampler", None), "guidance", 1.0) != 1.0
    terms, found = terms_per_update(config, _shares(config)), []
    for name, learns in config.recipe.learners().items():
        if learns.updates == 0:
            continue
        each = learns.objective.rows_per_term(config) * (2 if doubled and name == "policy" else 1)
        found.append(max(1, min(config.train.chunk, terms[name])) * each)
    return max(found)


def terms_per_sample(config: Config, learner: str = "policy") -> float:
    """Terms of a learner's loss per sample of the rollout, of which the policy may train on a part."""
    each = config.recipe.learners()[learner].objective.terms_per_sample(config)
    keep = getattr(config.rollout, "keep", None) if learner == "policy" else None
    return each * keep / config.rollout.group if keep else each


def terms_per_update(config: Config, processes: int) -> dict[str, int]:
    """Learner -> terms per optimizer step and process."""
    samples = config.rollout.prompts * config.rollout.group
    return {
        name: math.ceil(samples * terms_per_sample(config, name) / updates / processes)
        for name, learns in config.recipe.learners().items()
        for updates in [learns.updates or config.train.updates]
    }


def _rollout(config: Config, numbers: int) -> tuple[float, str]:
    samples = math.ceil(config.rollout.prompts * config.rollout.group / _shares(config))
    steps = 0
    if "trajectory" in config.recipe.needs:
        steps = config.rollout.sampler.stochastic_count  # type: ignore[union-attr]
    each, said = (4, "four") if {"predictions", "step_scores"} & {*config.recipe.needs} else (3, "three")
    drawn = min(getattr(config.rollout, "chunk", 1), samples) if config.memory.trajectories == "cpu" else samples
    how = f"latents of {samples} samples; their pixels wait on the CPU"
    if steps:
        how += f"; {steps} steps of {said} latents each, of {drawn}"
    return float(4 * numbers * (samples + drawn * each * steps)), how


def _shares(config: Config) -> int:
    """Number of shares into which the samples are divided: processes of this launch, or groups of them."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")) // config.parallel.context)
