"""One call each for notebooks and scripts: load a generator or a reward, sample, look, train step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.config.load import RewardOnly, validated
from align.config.load import load_reward as reward_settings
from align.config.model import GeneratorConfig
from align.config.sampling import Sampler
from align.config.starter import kind_of
from align.data.grids import draw_grid
from align.data.media import encode, to_pixels
from align.evaluation.evaluate import images, sample_media
from align.policy.build import build_generator, build_rewards
from align.policy.lora import load_lora
from align.runs.devices import chosen
from generators.settings import Memory

if TYPE_CHECKING:
    from PIL.Image import Image

    from align.config.settings import Config
    from align.training.trainer import Trainer
    from generators.base import Generator
    from rewards.base import Reward


def load_generator(
    kind: str | Config = "auto", path: str | Path | None = None, *, device: str | None = None,
    lora: str | Path | None = None, **options: Any,
) -> Generator:  # fmt: skip
    """A generator that is ready to sample.

    Args:
        kind: an adapter of ``alignflow recipes`` (``sd3``, ``flux``, ...); ``auto`` finds the one of a folder; or a
            config, whose sections ``generator`` and ``memory`` are used.
        path: diffusers folder or hub id; ``shapes`` for the embedded model of that kind.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` or ``auto``; the config's by default, else ``auto``.
        lora: LoRA file or folder in any layout that ``alignflow sample --lora`` reads.
        options: other settings of the section ``generator``, such as ``dtype="bfloat16"``.

    Raises:
        ConfigError: a setting is unknown or malformed, ``auto`` does not find the adapter, or this machine lacks the
            device.
        GeneratorError: the pipeline cannot be loaded.
        LoraError: the LoRA does not fit.
    """
    if isinstance(kind, str):
        named = {} if path is None else {"path": str(path)}
        if kind == "auto":
            kind = kind_of(named["path"], "give its kind") if named else "generic"
        settings, memory = validated(GeneratorConfig, {"kind": kind, **named, **options}), Memory()
    else:
        settings, memory = kind.generator, kind.memory
    generator = build_generator(settings, memory, chosen(device or settings.device))
    if lora is not None:
        load_lora(generator, lora)
    return generator


def load_reward(reward: str | Mapping[str, Any], device: str = "auto") -> Reward:
    """A reward that is ready to score: ``reward(media, prompts).values`` are its scores ``[N]``.

    Args:
        reward: a kind (``clip``, ``my_reward.py:redness``) or a mapping as in a config: ``{"kind": "clip", ...}``.

    Raises:
        ConfigError: a setting is unknown or malformed.
        RewardError: it cannot be loaded.
    """
    settings = (
        reward_settings(reward) if isinstance(reward, str) else validated(RewardOnly, {"reward": dict(reward)}).reward
    )
    return build_rewards({"reward": settings}, chosen(device))["reward"]


def sample(
    generator: Generator, prompts: Sequence[str], seeds: Sequence[int] | None = None, *, steps: int = 10,
    guidance: float = 1.0, chunk: int = 64, **sampler: Any,
) -> Tensor:  # fmt: skip
    """One sample per prompt, on the CPU.

    Args:
        seeds: ``[N]``, one per prompt; 0, 1, 2, ... by default. A sample depends on its seed, not on its batch.
        chunk: samples generated at a time.
        sampler: other settings of a sampler, such as ``kind="dpm2"``.

    Returns:
        media ``[N, 3, H, W]``, of videos ``[N, F, 3, H, W]``, in [0, 1].

    Raises:
        ValueError: seeds and prompts differ in number.
        ConfigError: a setting of the sampler is unknown or malformed.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, given {len(seeds)}")
    how = validated(Sampler, {"steps": steps, "guidance": guidance, **sampler})
    with torch.no_grad():
        return sample_media(generator, list(prompts), list(seeds), how, chunk)


def grid(media: Tensor, captions: Sequence[str] | None = None) -> Image:
    """A contact sheet of media ``[N, 3, H, W]`` in [0, 1], each with its caption; of a video the middle frame.

    Raises:
        ValueError: captions and media differ in number.
    """
    captions = [""] * len(media) if captions is None else list(captions)
    if len(captions) != len(media):
        raise ValueError(f"{len(media)} samples need as many captions, given {len(captions)}")
    return draw_grid(images(media), captions)


def animation(video: Tensor, fps: float = 16, width: int | None = None) -> bytes:
    """An animated GIF of one video, for ``IPython.display.Image``.

    Args:
        video: ``[F, 3, H, W]`` in [0, 1].
        width: width of the GIF in pixels; frames are enlarged without smoothing. The video's width by default.
    """
    if video.ndim != 4:
        raise ValueError(f"an animation needs one video [F, 3, H, W], given {list(video.shape)}")
    if width is not None:
        size = (round(video.shape[-2] * width / video.shape[-1]), width)
        video = torch.nn.functional.interpolate(video.float(), size, mode="nearest")
    return encode(to_pixels(video[None])[0], ".gif", fps)


@contextmanager
def training(config: Config, *, overwrite: bool = False) -> Iterator[Trainer]:
    """A trainer whose steps you take yourself: ``row = trainer.step(n)`` for n = 0, 1, ...

    The block owns the run folder. Nothing is evaluated, logged or saved unless you call ``trainer.log`` and
    ``trainer.export``; ``alignflow.train`` does all of it.

    Raises:
        AlignflowError: as :func:`align.training.trainer.train`.
    """
    from align.training.trainer import entered

    with entered(config, overwrite=overwrite) as trainer:
        yield trainer
