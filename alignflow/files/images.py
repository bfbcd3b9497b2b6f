"""Image files -> uint8 pixels: any Pillow mode, rotated upright, opaque, of bounded size."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from alignflow.errors import AlignflowError
from alignflow.renamed import variable
from alignflow.text import first_line, printable

FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "AVIF", "HEIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA", "ICO", "QOI",
)  # fmt: skip
"""Formats that are opened. Pillow supports more, some of which run programs."""
READ = "png, jpg, webp, gif, avif, bmp, tiff, ppm, jp2, tga and ico"

IMAGE_LIMIT = ("ALIGNFLOW_IMAGE_PIXELS", 1 << 26)
VIDEO_LIMIT = ("ALIGNFLOW_VIDEO_PIXELS", 1 << 28)
"""Environment variable and default of what an image (8192 x 8192) and a video (129 frames of 1920 x 1080) may have."""

_ORIENTATION = 0x0112
_MIN_IS_WHITE = (262, 0)
_BITS = "bits a channel"


class ImageError(AlignflowError, ValueError):
    """An image or video that cannot be read; the message gives the reason."""


def limit(which: tuple[str, int]) -> int:
    """The pixels allowed by :data:`IMAGE_LIMIT` or :data:`VIDEO_LIMIT`; raises ImageError for a variable that is
    not a whole number above 0."""
    name, default = which
    given = variable(name)
    if not given:
        return default
    if not given.isascii() or not given.isdigit() or not 0 < len(given) < 16 or int(given) < 1:
        raise ImageError(f"the environment variable {name} should be a number of pixels, given {given[:40]!r}")
    return int(given)


def check_image(width: int, height: int) -> None:
    """Raise ImageError if an image has more pixels than are allowed."""
    if width * height > (most := limit(IMAGE_LIMIT)):
        raise ImageError(
            f"{width} x {height} pixels are more than the {most} that an image may have; "
            f"set {IMAGE_LIMIT[0]}={width * height} to read it"
        )


def check_video(frames: int, width: int, height: int) -> None:
    """Raise ImageError if a video has more frames x pixels than are allowed; small frames count as 64 x 64."""
    check_image(width, height)
    pixels = frames * max(width * height, 4096)
    if pixels > (most := limit(VIDEO_LIMIT)):
        raise ImageError(
            f"{frames} frames of {width} x {height} are more than the {most} pixels that a video may have; "
            f"set {VIDEO_LIMIT[0]}={pixels} to read it"
        )


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """A file's image, not decoded yet.

    Raises:
        ImageError: it is not an image, is damaged, or has more pixels than are allowed; what is raised within the
            block, by decoding, becomes one too.
        FileNotFoundError: there is no such file.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    most = limit(IMAGE_LIMIT)
    if Image.MAX_IMAGE_PIXELS is not None and most > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most  # our limit replaces Pillow's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about metadata; wrong pixels are an error
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known) as image:
                check_image(*image.size)
                image.info[_BITS] = _depth(image)  # unknown after decoding
                yield image
    except (ImageError, FileNotFoundError):
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"it is damaged or of another kind; images are read from {READ}") from None
    except MemoryError:
        raise ImageError("it does not fit into memory") from None
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise ImageError(first_line(error)) from error


def read_image(source: Path | bytes) -> np.ndarray:
    """The first image in a file, uint8 ``[H, W, 3]``; see :func:`opaque`.

    Raises:
        ImageError, FileNotFoundError: as :func:`opened`.
    """
    with opened(source) as image:
        return opaque(image)


def opaque(image: Image.Image, turn: int | None = None) -> np.ndarray:
    """uint8 ``[H, W, 3]``, turned as its camera says, white where it is transparent.

    16 bits become their upper 8, floating-point numbers in [0, 1] the 256 steps.

    Args:
        turn: the orientation where it is known, 1 to 8 as Exif numbers them.

    Raises:
        ImageError: its numbers have no scale.
    """
    return _turned(_colours(image), orientation(image) if turn is None else turn)


def orientation(image: Image.Image) -> int:
    """1 to 8 as Exif numbers them; 1 if there is none that can be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # an odd Exif block does not make the image unreadable
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


def _colours(image: Image.Image) -> np.ndarray:
    image.load()
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        return _deep_grey(image)
    if mode == "I":
        raise ImageError("it holds 32-bit or signed integers, which have no scale; save it with 8 or 16 bits")
    if mode == "F":
        return _floating(image)
    if mode == "LAB":
        image = _from_lab(image)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(_with_key(image).convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _on_white(image: Image.Image) -> np.ndarray:
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def _deep_grey(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    grey = (values >> 8).clip(0, 255).astype(np.uint8)
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_MIN_IS_WHITE[0]) == _MIN_IS_WHITE[1]:  # Pillow inverts it back only for 8 bits
        grey = 255 - grey
    if isinstance(key := image.info.get("transparency"), int):
        grey = np.where(values == key, np.uint8(255), grey)
    return np.repeat(grey[..., None], 3, -1)


def _floating(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, np.float32)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ImageError(f"it holds floating-point numbers from {low:g} to {high:g}; only those in 0 to 1 have a scale")
    return np.repeat((values * 255).round().astype(np.uint8)[..., None], 3, -1)


def _from_lab(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    found = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    if found is None:
        raise ImageError("it holds Lab colours, which cannot be converted")
    return found


def _with_key(image: Image.Image) -> Image.Image:
    """The image with its transparent colour in 8 bits, as its pixels are."""
    key, depth = image.info.get("transparency"), image.info.get(_BITS, 8)
    if depth == 8 or not isinstance(key, int | tuple) or image.mode not in ("L", "RGB"):
        return image
    image = image.copy()
    whole = key if isinstance(key, tuple) else (key,)
    scaled = tuple(value >> 8 if depth == 16 else value * 255 // ((1 << depth) - 1) for value in whole)
    image.info["transparency"] = scaled if isinstance(key, tuple) else scaled[0]
    return image


def _depth(image: Image.Image) -> int:
    """Bits a channel of a PNG that is not decoded yet; 8 of any other file."""
    tiles: Any = getattr(image, "tile", None)
    form = str(tiles[0].args) if image.format == "PNG" and tiles else ""
    found = re.fullmatch(r"[A-Z]+;(\d+)[A-Z]?", form)
    return int(found[1]) if found else 8


def named(source: Path | bytes) -> str:
    """How messages call a file."""
    return "the image" if isinstance(source, bytes) else printable(source, 300)
