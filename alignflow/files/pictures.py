"""Image files -> uint8 pixels: any Pillow mode, rotated upright, opaque, of bounded size."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from alignflow.errors import AlignflowError
from alignflow.text import first_line, printable

FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "AVIF", "HEIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA", "ICO", "QOI",
)  # fmt: skip
"""What is opened. Pillow knows more, some of which run programs."""
READ = "png, jpg, webp, gif, avif, bmp, tiff, ppm, jp2, tga and ico"

PICTURE_LIMIT = ("ALIGNFLOW_PICTURE_PIXELS", 1 << 26)
CLIP_LIMIT = ("ALIGNFLOW_CLIP_PIXELS", 1 << 28)
"""Environment variable and default of what a picture (8192 x 8192) and a clip (129 frames of 1920 x 1080) may have."""

_ORIENTATION = 0x0112
_MIN_IS_WHITE = (262, 0)
_BITS = "bits a channel"


class PictureError(AlignflowError, ValueError):
    """A picture or clip that cannot be read; says why."""


def limit(which: tuple[str, int]) -> int:
    """The pixels allowed by :data:`PICTURE_LIMIT` or :data:`CLIP_LIMIT`; raises PictureError for a variable that is
    not a whole number above 0."""
    name, default = which
    given = os.environ.get(name, "")
    if not given:
        return default
    if not given.isascii() or not given.isdigit() or not 0 < len(given) < 16 or int(given) < 1:
        raise PictureError(f"the environment variable {name} should be a number of pixels, given {given[:40]!r}")
    return int(given)


def check_picture(width: int, height: int) -> None:
    """Raise PictureError where a picture has more pixels than are allowed."""
    if width * height > (most := limit(PICTURE_LIMIT)):
        raise PictureError(
            f"{width} x {height} pixels are more than the {most} that a picture may have; "
            f"set {PICTURE_LIMIT[0]}={width * height} to read it"
        )


def check_clip(frames: int, width: int, height: int) -> None:
    """Raise PictureError where a clip has more frames x pixels than are allowed; small frames count as 64 x 64."""
    check_picture(width, height)
    pixels = frames * max(width * height, 4096)
    if pixels > (most := limit(CLIP_LIMIT)):
        raise PictureError(
            f"{frames} frames of {width} x {height} are more than the {most} pixels that a clip may have; "
            f"set {CLIP_LIMIT[0]}={pixels} to read it"
        )


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """A file's picture, not decoded yet.

    Raises:
        PictureError: it is not a picture, is damaged, or has more pixels than are allowed; what is raised within the
            block, by decoding, becomes one too.
        FileNotFoundError: there is no such file.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    most = limit(PICTURE_LIMIT)
    if Image.MAX_IMAGE_PIXELS is not None and most > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most  # who raised our limit has raised Pillow's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; what is wrong with pixels is an error
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known) as image:
                check_picture(*image.size)
                image.info[_BITS] = _depth(image)  # nothing tells once it is decoded
                yield image
    except (PictureError, FileNotFoundError):
        raise
    except Image.UnidentifiedImageError:
        raise PictureError(f"it is damaged or of another kind; pictures are read from {READ}") from None
    except MemoryError:
        raise PictureError("it does not fit into memory") from None
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise PictureError(first_line(error)) from error


def read_picture(source: Path | bytes) -> np.ndarray:
    """The first picture in a file, uint8 ``[H, W, 3]``; see :func:`opaque`.

    Raises:
        PictureError, FileNotFoundError: as :func:`opened`.
    """
    with opened(source) as image:
        return opaque(image)


def opaque(picture: Image.Image, turn: int | None = None) -> np.ndarray:
    """uint8 ``[H, W, 3]``, turned as its camera says, white where it is transparent.

    16 bits become their upper 8, floating-point numbers in [0, 1] the 256 steps.

    Args:
        turn: the orientation where it is known, 1 to 8 as Exif numbers them.

    Raises:
        PictureError: its numbers have no scale.
    """
    return _turned(_colours(picture), orientation(picture) if turn is None else turn)


def orientation(picture: Image.Image) -> int:
    """1 to 8 as Exif numbers them; 1 where there is none that can be read."""
    try:
        found = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # an odd Exif block is no reason not to show the picture
        return 1
    return int(found) if isinstance(found, int) and 1 <= found <= 8 else 1


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    if turn in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _colours(picture: Image.Image) -> np.ndarray:
    picture.load()
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM")):
        return _deep_grey(picture)
    if mode == "I":
        raise PictureError("it holds 32-bit or signed integers, which have no scale; save it with 8 or 16 bits")
    if mode == "F":
        return _floating(picture)
    if mode == "LAB":
        picture = _from_lab(picture)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        return _on_white(_with_key(picture).convert("RGBA"))
    return np.asarray(picture.convert("RGB"))


def _on_white(picture: Image.Image) -> np.ndarray:
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def _deep_grey(picture: Image.Image) -> np.ndarray:
    values = np.asarray(picture).astype(np.int64)
    grey = (values >> 8).clip(0, 255).astype(np.uint8)
    tags: Any = getattr(picture, "tag_v2", {})
    if tags.get(_MIN_IS_WHITE[0]) == _MIN_IS_WHITE[1]:  # which Pillow undoes for 8 bits alone
        grey = 255 - grey
    if isinstance(key := picture.info.get("transparency"), int):
        grey = np.where(values == key, np.uint8(255), grey)
    return np.repeat(grey[..., None], 3, -1)


def _floating(picture: Image.Image) -> np.ndarray:
    values = np.asarray(picture, np.float32)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise PictureError(
            f"it holds floating-point numbers from {low:g} to {high:g}; only those in 0 to 1 have a scale"
        )
    return np.repeat((values * 255).round().astype(np.uint8)[..., None], 3, -1)


def _from_lab(picture: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    found = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
    if found is None:
        raise PictureError("it holds Lab colours, which cannot be converted")
    return found


def _with_key(picture: Image.Image) -> Image.Image:
    """The picture with its transparent colour in 8 bits, as its pixels are."""
    key, depth = picture.info.get("transparency"), picture.info.get(_BITS, 8)
    if depth == 8 or not isinstance(key, int | tuple) or picture.mode not in ("L", "RGB"):
        return picture
    picture = picture.copy()
    whole = key if isinstance(key, tuple) else (key,)
    scaled = tuple(value >> 8 if depth == 16 else value * 255 // ((1 << depth) - 1) for value in whole)
    picture.info["transparency"] = scaled if isinstance(key, tuple) else scaled[0]
    return picture


def _depth(picture: Image.Image) -> int:
    """Bits a channel of a PNG that is not decoded yet; 8 of any other file."""
    tiles: Any = getattr(picture, "tile", None)
    form = str(tiles[0].args) if picture.format == "PNG" and tiles else ""
    found = re.fullmatch(r"[A-Z]+;(\d+)[A-Z]?", form)
    return int(found[1]) if found else 8


def named(source: Path | bytes) -> str:
    """How messages call a file."""
    return "the picture" if isinstance(source, bytes) else printable(source, 300)
