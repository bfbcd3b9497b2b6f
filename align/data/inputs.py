"""Inputs that accompany prompts, as tensors: for the generator, and for rewards that need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.data.files import writing
from align.data.media import fit, read_pixels, to_tensor
from align.data.prompts import Prompt, check_media
from align.data.tables import Cell
from alignflow.errors import DataError
from generators.base import Conditioning, Generator
from generators.text_cache import TextCache
from rewards.base import Reward

Inputs = dict[str, Any]
"""``image [N, 3, H, W]``, ``mask [N, 1, H, W]`` in [0, 1], ``metadata`` N dicts; only what was asked for."""


def encode(generator: Generator, prompts: Sequence[Prompt], wants: Iterable[str] = ()) -> tuple[Conditioning, Inputs]:
    """Conditioning and inputs of N prompts, a row each; a prompt that occurs twice is read and encoded once.

    Args:
        wants: names of inputs of the rewards, besides those of the generator.

    Raises:
        DataError: media that cannot be read; names the prompt's place.
        GeneratorError: a prompt too long.
    """
    unique = list(dict.fromkeys(prompts))
    place = {prompt: number for number, prompt in enumerate(unique)}
    row = torch.tensor([place[prompt] for prompt in prompts])
    inputs = read_inputs(unique, {*generator.inputs, *wants}, generator.size)
    cond = generator.encode([prompt.text for prompt in unique], inputs)
    cond = cond[row.to(generator.device)]
    if generator.users is not None:
        user = generator.users(prompts).to(generator.device)
        cond = replace(cond, tensors={**cond.tensors, "user": user})
    return cond, take(inputs, row)


def remember(generator: Generator, prompts: Sequence[Prompt], folder: Path | None, chunk: int = 16) -> None:
    """Encode every prompt once and let go of the text encoders.

    Args:
        folder: where the embeddings are kept, those of an earlier start included; None = in memory.
        chunk: prompts encoded at a time.

    Raises:
        DataError, GeneratorError: as :func:`encode`, and of a pipeline that needs its encoders.
        RunFolderError: the folder cannot be written.
    """
    generator.check_droppable()
    cache = TextCache(folder)
    unique = list(dict.fromkeys(prompts))
    for start in range(0, len(unique), chunk):
        some = unique[start : start + chunk]
        inputs = read_inputs(some, generator.inputs, generator.size)
        with writing(folder or Path()):
            generator.remember(cache, [prompt.text for prompt in some], inputs)
    generator.drop_encoders(cache)


def read_inputs(prompts: Sequence[Prompt], names: Iterable[str], size: tuple[int, int]) -> Inputs:
    """Inputs of the prompts at ``size``: see :data:`Inputs`."""
    wanted = set(names)
    found: Inputs = {"metadata": [dict(prompt.metadata) for prompt in prompts]} if "metadata" in wanted else {}
    images = [images_of(prompt, sorted(wanted - {"metadata"})) for prompt in prompts]
    for name in wanted - {"metadata"}:
        stacked = torch.stack([to_tensor(fit(one[name], size)) for one in images])
        found[name] = stacked.mean(1, keepdim=True) if name == "mask" else stacked
    return found


def check_needs(prompts: Sequence[Prompt], generator: Generator, rewards: Mapping[str, Reward]) -> None:
    """Raise DataError for a prompt that comes without an image which the generator or a reward needs."""
    check_media(prompts, generator.inputs, generator.pipeline_class)
    for reward in rewards.values():
        check_media(prompts, reward.wants, f"reward {reward.name!r}")


def take(inputs: Inputs, row: Tensor) -> Inputs:
    """Rows by index ``[M]`` on the CPU; an index may repeat."""
    index = row.tolist()
    return {
        name: value[row] if isinstance(value, Tensor) else [value[i] for i in index] for name, value in inputs.items()
    }


def read_sample(prompt: Prompt, name: str, size: tuple[int, int], frames: int | None) -> Tensor:
    """A stored sample as the generator would return it: ``[3, H, W]``, or ``[F, 3, H, W]`` for a generator of videos.

    Raises:
        DataError: it cannot be read, is an image instead of a video or the reverse, or has another number of frames.
    """
    pixels = pixels_of(prompt, name)
    found = len(pixels) if pixels.ndim == 4 else None
    if found != frames:
        is_, should = (f"a video of {n} frames" if n else "an image" for n in (found, frames))
        remedy = "; set generator.frames or cut the video" if found and frames else ""
        raise DataError(f"{prompt.where}: {name!r} is {is_}, the generator makes {should}{remedy}")
    return to_tensor(fit(pixels, size))


def images_of(prompt: Prompt, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named media of one prompt at their own size; they are cropped alike, so they must be of one size."""
    found = {name: pixels_of(prompt, name) for name in names}
    for name, pixels in found.items():
        if pixels.ndim == 4:
            raise DataError(f"{prompt.where}: {name!r} is a video of {len(pixels)} frames; give an image")
    sizes = {name: pixels.shape[:2] for name, pixels in found.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {height} x {width}" for name, (height, width) in sizes.items())
        raise DataError(f"{prompt.where}: images of one prompt must be of one size, height x width; they are {said}")
    return found


def pixels_of(prompt: Prompt, name: str) -> np.ndarray:
    """Pixels of one of a prompt's media, an image or a video; DataError that names row and column."""
    source = prompt.media[name]
    content: bytes | Path | None = source.content() if isinstance(source, Cell) else source
    if content is None:
        raise DataError(f"{prompt.where}: {name!r} is empty")
    try:
        return read_pixels(content)
    except DataError as error:
        raise DataError(f"{prompt.where}: {name!r}: {error}") from None
