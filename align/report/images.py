"""Samples before, during and after training, inlined as images; videos as animated webp."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from align.data.media import encode, fit, read_pixels
from align.maths.seeds import derive
from align.report.charts import MINUS
from align.report.reading import Run, Samples
from alignflow.errors import DataError

PIXEL_ART = 96
"""Images up to this side are kept as they are and enlarged with hard edges."""
PAIR_SIDE, STRIP_SIDE = 384, 160
MAX_PAIRS, MAX_STRIPS, MAX_VISITS = 24, 8, 8
LARGE_PAIRS = 12
"""Pairs shown when images are too large to embed unchanged."""
LARGE_VIDEOS, VIDEO_FRAMES = 6, 24
"""The same for videos, and how many frames of a video are embedded, evenly."""


@dataclass(frozen=True)
class InlineImage:
    """An embedded image; of a video also its middle frame, for those who asked for less motion and for print."""

    uri: str
    width: int
    height: int
    crisp: bool
    still: str = ""


@dataclass(frozen=True)
class Score:
    """One score of one image before and after, with equally many decimals."""

    name: str
    before: str
    after: str
    direction: str
    known: bool


@dataclass(frozen=True)
class Pair:
    """One prompt and noise at two visits, and the image that an edit is made from.

    Args:
        noise: seed of the noise, as ``torch.Generator().manual_seed`` takes it.
    """

    prompt: str
    noise: int
    before: InlineImage | None
    after: InlineImage | None
    scores: list[Score]
    source: InlineImage | None = None


@dataclass(frozen=True)
class Strip:
    """One prompt and seed at every visit."""

    prompt: str
    frames: list[tuple[int, InlineImage | None]]


@dataclass(frozen=True)
class Gallery:
    """All images of the page. Without a second visit, pairs hold the first alone."""

    first: int
    last: int
    total: int
    pairs: list[Pair]
    strips: list[Strip]


def gallery(run: Run) -> Gallery | None:
    """Images of the first and last visit, and of those between; rows are in the first visit's order, all of them."""
    visits = [visit for visit in run.samples if visit.prompts]
    if not visits:
        return None
    first, last = visits[0], visits[-1]
    shared = [key for key in _keys(first) if key in set(_keys(last))]
    probe = embed(first.images[0], PAIR_SIDE)
    large = LARGE_VIDEOS if first.video else LARGE_PAIRS
    shown = shared[: MAX_PAIRS if probe is None or probe.crisp else large]
    pairs = [_pair(first, last, key) for key in shown]
    between = _spread_out(visits)
    strips = [_strip(between, key) for key in shown[:MAX_STRIPS]] if len(between) > 2 else []
    return Gallery(first.step, last.step, len(shared), pairs, strips)


def embed(path: Path, side: int) -> InlineImage | None:
    """The image as a data URI, no larger than ``side``; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if max(image.size) <= PIXEL_ART:
                return InlineImage(_uri(path.read_bytes(), "png"), width, height, crisp=True)
            small = image.convert("RGB")
            small.thumbnail((side, side))
    except Exception:  # what cannot be read is left out, whatever Pillow says of it
        return None
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82)
    return InlineImage(_uri(buffer.getvalue(), "webp"), *small.size, crisp=False)


def embed_video(path: Path, middle: InlineImage, fps: float) -> InlineImage:
    """A video at the size of its embedded middle frame; that frame alone where the video cannot be read."""
    try:
        pixels = read_pixels(path)
    except DataError:
        return middle
    every = -(-len(pixels) // VIDEO_FRAMES) if pixels.ndim == 4 else 1
    frames = fit(pixels[::every] if pixels.ndim == 4 else pixels, (middle.height, middle.width))
    content = encode(np.ascontiguousarray(frames), ".webp", fps / every, quality=None if middle.crisp else 70)
    return InlineImage(_uri(content, "webp"), middle.width, middle.height, middle.crisp, still=middle.uri)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _keys(visit: Samples) -> list[tuple[str, int]]:
    return list(dict.fromkeys(zip(visit.prompts, visit.seeds, strict=False)))


def _row(visit: Samples, key: tuple[str, int]) -> int | None:
    rows = list(zip(visit.prompts, visit.seeds, strict=False))
    return rows.index(key) if key in rows else None


def thumbnail(visit: Samples, key: tuple[str, int], side: int) -> InlineImage | None:
    """The image of a prompt and seed, of a video the middle frame; None if the visit has none of it."""
    row = _row(visit, key)
    return None if row is None else embed(visit.images[row], side)


def _playing(visit: Samples, key: tuple[str, int]) -> InlineImage | None:
    """The image of a pair, or its video."""
    row = _row(visit, key)
    return None if row is None else playing(visit.images[row], visit.video_file(row), visit.fps)


def playing(image: Path, video: Path | None, fps: float, side: int = PAIR_SIDE) -> InlineImage | None:
    """An embedded image, or the video that it is the middle frame of."""
    middle = embed(image, side)
    return middle if middle is None or video is None else embed_video(video, middle, fps)


def _pair(first: Samples, last: Samples, key: tuple[str, int]) -> Pair:
    after = _playing(last, key) if last.step != first.step else None
    row = _row(first, key)
    source = embed(first.sources[row], PAIR_SIDE) if first.sources and row is not None else None
    return Pair(key[0], derive(key[1], "start"), _playing(first, key), after, _scores(first, last, key), source)


def _scores(first: Samples, last: Samples, key: tuple[str, int]) -> list[Score]:
    return [score_of(name, _value(first, name, key), _value(last, name, key)) for name in first.scores | last.scores]


def _value(visit: Samples, name: str, key: tuple[str, int]) -> float | None:
    row, column = _row(visit, key), visit.scores.get(name, [])
    return column[row] if row is not None and row < len(column) else None


def score_of(name: str, before: float | None, after: float | None) -> Score:
    """A caption's score; its direction is empty where both ends read the same, or one is missing."""
    decimals = 2 if max(abs(before or 0), abs(after or 0)) < 10 else 1
    start, end = ("no score" if v is None else f"{v:,.{decimals}f}".replace("-", MINUS) for v in (before, after))
    rising = before is not None and after is not None and after > before
    moved = before is not None and after is not None and start != end
    return Score(name, start, end, "" if not moved else "up" if rising else "down", (before, after) != (None, None))


def _spread_out(visits: list[Samples]) -> list[Samples]:
    """At most :data:`MAX_VISITS` of them, evenly, both ends included."""
    if len(visits) <= MAX_VISITS:
        return visits
    return [visits[round(i * (len(visits) - 1) / (MAX_VISITS - 1))] for i in range(MAX_VISITS)]


def _strip(visits: list[Samples], key: tuple[str, int]) -> Strip:
    return Strip(key[0], [(visit.step, thumbnail(visit, key, STRIP_SIDE)) for visit in visits])
