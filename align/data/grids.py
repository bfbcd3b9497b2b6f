"""Sample folders: the same prompts and seeds every time, as single images, one labelled grid and a small index."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from align.data.files import new_folder, write_json
from align.data.media import encode

SMALLEST, LARGEST = 128, 512
"""Sides of a cell of the grid, in pixels; smaller images grow by whole factors, larger ones shrink."""
LOSSLESS = 96
"""Videos up to this side are written without loss; larger ones would take megabytes and seconds each."""
PADDING, FONT_SIZE, MAX_LINES = 8, 12, 4
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf")
"""Fonts of systems, for prompts that Pillow's own cannot show."""
SHEET, GRID = "sheet", "grid.png"
"""Folder inside a folder of samples for what is not a sample, and name of the contact sheet."""
SOURCE = "-source.png"
"""Ending of a source's file name, after the number of its sample."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_samples(
    folder: Path,
    images: Sequence[Any],
    prompts: Sequence[str],
    seeds: Sequence[int],
    scores: Mapping[str, Sequence[float | None]] | None = None,
    *,
    sources: Sequence[Any] | None = None,
    fps: float = 16,
    video: str = "webp",
    noise: Sequence[int] | None = None,
    replaces: bool = False,
    apart: bool = False,
) -> Path:
    """Write ``000.png ...``, ``grid.png`` and ``prompts.json``; the folder appears complete or not at all.

    A video is written as ``000.webp`` (or gif, mp4) beside its middle frame ``000.png``, the image that an edit was
    made from as ``000-source.png``; in the grid it is left of the edit.

    Args:
        folder: usually ``samples/step-000030``.
        images: N PIL images, uint8 arrays ``[H, W, 3]``, or videos ``[F, H, W, 3]``.
        prompts: N captions.
        seeds: N seeds.
        scores: name -> N scores; NaN and None both mean that the score could not be had.
        sources: N images that the samples were made from, where prompts come with one.
        fps: frames per second of the videos.
        video: file format of videos; webp keeps every pixel up to :data:`LOSSLESS` of them a side.
        noise: N seeds of the samples' initial noise, as ``torch.Generator().manual_seed`` takes them.
        replaces: whether an existing folder goes, one of a run.
        apart: put the grid and the sources into :data:`SHEET` inside, so that the folder's images are the samples.

    Raises:
        RunFolderError: the folder exists, holds something and is not to be replaced.
        DataError: mp4 without a codec.
    """
    table = {name: [_finite(value) for value in values] for name, values in (scores or {}).items()}
    _check_lengths(len(images), prompts=prompts, seeds=seeds, sources=sources, **table)
    stills, before = [_image(still(image)) for image in images], [_image(image) for image in sources or ()]
    moving = {index: image for index, image in enumerate(images) if np.ndim(image) == 4}
    with new_folder(folder, replaces=replaces) as staging:
        beside = staging / SHEET if apart else staging
        _write_stills(staging, beside, stills, before)
        _write_videos(staging, moving, video, fps)
        if stills:
            _write_grid(beside / GRID, stills, before, prompts, table)
        content = _numbered(prompts, seeds, noise) | ({"clips": video, "fps": fps} if moving else {})
        content |= ({"sources": True} if before else {}) | ({"scores": table} if table else {})
        write_json(staging / "prompts.json", content)
    return folder


def _numbered(prompts: Sequence[str], seeds: Sequence[int], noise: Sequence[int] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"prompts": list(prompts), "seeds": [int(seed) for seed in seeds]}
    return found if noise is None else found | {"noise_seeds": [int(seed) for seed in noise]}


def _check_lengths(count: int, **columns: Sequence[Any] | None) -> None:
    for name, column in columns.items():
        if column is not None and len(column) != count:
            raise ValueError(f"save_samples: {count} images, but {len(column)} {name}")


def _write_stills(folder: Path, beside: Path, stills: Sequence[Any], before: Sequence[Any]) -> None:
    """The samples, or the middle frames of videos, into ``folder``, and their sources into ``beside``."""
    beside.mkdir(exist_ok=True)
    for index, one in enumerate(stills):
        one.save(folder / f"{index:03d}.png")
    for index, one in enumerate(before):
        one.save(beside / f"{index:03d}{SOURCE}")


def _write_videos(folder: Path, moving: Mapping[int, Any], video: str, fps: float) -> None:
    for index, frames in moving.items():
        quality = None if max(frames.shape[1:3]) <= LOSSLESS else 90
        (folder / f"{index:03d}.{video}").write_bytes(encode(frames, f".{video}", fps, quality=quality))


def _write_grid(
    path: Path, stills: list[Any], before: list[Any], prompts: Sequence[str], table: dict[str, list[float | None]]
) -> None:
    """The contact sheet: every sample, right of its source if it has one, with prompt and scores."""
    font = font_of(prompts)
    labels = [_label(_legible(prompt, row, font), table, row) for row, prompt in enumerate(prompts)]
    cells = [_beside(*pair) for pair in zip(before, stills, strict=True)] if before else stills
    draw_grid(cells, labels, font).save(path)


def still(image: Any) -> Any:
    """The image itself; of a video ``[F, H, W, 3]`` the middle frame."""
    return image[len(image) // 2] if np.ndim(image) == 4 else image


def draw_grid(images: Sequence[Any], labels: Sequence[str], font: Font | None = None) -> Image.Image:
    """Images (PIL or arrays) in a near-square grid, each with its label wrapped below (newlines start a new line)."""
    font = font or font_of(labels)
    cells = [_fit(_image(image)) for image in images]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    texts = [_wrap(label, font, width) for label in labels]
    line = FONT_SIZE + 4
    cell_width, cell_height = width + PADDING, height + line * max(map(len, texts)) + 2 * PADDING
    columns = min(len(cells), max(2, math.ceil(math.sqrt(len(cells) * cell_height / cell_width))))
    rows = math.ceil(len(cells) / columns)
    columns = math.ceil(len(cells) / rows)
    grid = Image.new("RGB", (columns * cell_width + PADDING, rows * cell_height + PADDING), "white")
    draw = ImageDraw.Draw(grid)
    for index, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        x, y = PADDING + index % columns * cell_width, PADDING + index // columns * cell_height
        grid.paste(cell, (x, y))
        for row, words in enumerate(text):
            draw.text((x, y + height + 4 + row * line), words, fill="#222222", font=font)
    return grid


def _image(image: Any) -> Image.Image:
    return image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image).convert("RGB")


def _beside(source: Image.Image, sample: Image.Image) -> Image.Image:
    """A source and what was made of it, side by side."""
    left, right = _fit(source), _fit(sample)
    both = Image.new("RGB", (left.width + PADDING // 2 + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + PADDING // 2, 0))
    return both


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 6)


@cache
def _fonts() -> list[Font]:
    """Pillow's own font, which has little but ASCII, then those of :data:`FONTS` that this machine has."""
    found: list[Font] = [ImageFont.load_default(size=FONT_SIZE)]
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, FONT_SIZE))
        except OSError:
            continue
    return found


def font_of(texts: Sequence[str]) -> Font:
    """The first font that has a glyph for every character of the texts, else Pillow's own."""
    return next((font for font in _fonts() if all(_drawn(font, text) for text in texts)), _fonts()[0])


def _drawn(font: Font, text: str) -> bool:
    """Whether a font draws a text as it is read; letters that join or run leftwards need a layout engine."""
    shaped = any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)
    if shaped and not features.check("raqm"):
        return False
    return all(character.isspace() or _has_glyph(font, character) for character in text)


def _legible(prompt: str, row: int, font: Font) -> str:
    """The prompt, or where to read it if the font cannot draw it."""
    return prompt if _drawn(font, prompt) else f"{row:03d}.png, text in prompts.json"


def _has_glyph(font: Font, character: str) -> bool:
    """Whether a character looks different from the box that stands for every unknown one."""
    try:
        drawn, unknown = (font.getmask(one) for one in (character, "\uffff"))
    except UnicodeEncodeError:
        return False
    return (drawn.size, bytes(drawn)) != (unknown.size, bytes(unknown))


def _label(prompt: str, scores: Mapping[str, Sequence[float | None]], row: int) -> str:
    values = "  ".join(
        f"{name} {'-' if column[row] is None else f'{column[row]:.3g}'}" for name, column in scores.items()
    )
    return f"{prompt}\n{values}" if values else prompt


def _fit(image: Image.Image) -> Image.Image:
    """Grow by a whole factor to at least :data:`SMALLEST`, or shrink to at most :data:`LARGEST`."""
    if max(image.size) > LARGEST:
        scale = LARGEST / max(image.size)
        return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    factor = math.ceil(SMALLEST / max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrap(label: str, font: Font, width: int) -> list[str]:
    """Lines no wider than ``width``; the prompt takes at most :data:`MAX_LINES`, scores as many as they need."""
    prompt, *rest = label.split("\n")
    lines = _lines(prompt.split(" "), " ", font, width)
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(f"{last} ...") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], f"{last} ..."]
    return [*lines, *(line for scores in rest for line in _lines(scores.split("  "), "  ", font, width))]


def _lines(words: Sequence[str], gap: str, font: Font, width: int) -> list[str]:
    """Greedy lines of words; a word wider than a line is broken wherever it must be."""
    lines = [""]
    for word in words:
        candidate = f"{lines[-1]}{gap}{word}" if lines[-1] else word
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
