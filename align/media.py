"""Pictures and clips in files: read as pixels or tensors, encoded and written whole.

Pixels are uint8 ``[H, W, 3]`` or ``[F, H, W, 3]``; torch is imported only for tensors. Pillow reads and writes
pictures, animated webp and gif, imageio the containers of video.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from align.errors import DataError
from align.files import write_bytes
from rewards.pictures import opaque

if TYPE_CHECKING:
    from torch import Tensor

VIDEO = (".mp4", ".mov", ".webm", ".mkv", ".avi")
"""Containers that need a codec; mp4 is the one that is written."""
ANIMATED = (".webp", ".gif")
MOVING = ("WEBP", "GIF", "PNG", "AVIF")
"""Formats whose further frames are motion; elsewhere they are pages, previews or the second eye of a camera."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}


# -- in ---------------------------------------------------------------------------------------------------------------


def read_media(source: Path | bytes, size: tuple[int, int] | None = None) -> Tensor:
    """A picture as ``[3, H, W]`` or a clip as ``[F, 3, H, W]``, float32 in [0, 1]; see :func:`read_pixels`.

    Args:
        size: (height, width) to resize to, cropped about the middle; the file's own by default.
    """
    return to_tensor(fit(read_pixels(source), size))


def read_pixels(source: Path | bytes) -> np.ndarray:
    """Pixels of a picture or clip, turned as its camera says; transparent parts become white.

    A file of one frame is a picture. A frame that is held for a whole number of times the shortest is repeated as
    often: webp and gif write equal neighbours once (a clip that never moves becomes a picture so).

    Raises:
        DataError: there is no such file, it cannot be read to its end, or it needs a codec that is not installed.
    """
    if isinstance(source, Path) and source.suffix.lower() in VIDEO:
        return _read_video(source)
    name = "the picture" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            frames, held = [], []
            for frame in ImageSequence.Iterator(image) if image.format in MOVING else [image]:
                frames.append(opaque(frame))
                held.append(int(frame.info.get("duration") or 0))
    except FileNotFoundError:
        raise DataError(f"no image {name}") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} is not an image that can be read: {error}") from None
    pixels = np.stack(frames)
    return pixels[0] if len(pixels) == 1 else np.repeat(pixels, _times(held), axis=0)


def fit(pixels: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Pixels at ``size`` (height, width): cropped about the middle to its shape, then resized."""
    if size is None or pixels.shape[-3:-1] == tuple(size):
        return pixels
    frames = pixels if pixels.ndim == 4 else pixels[None]
    shape = size[1], size[0]
    resized = [ImageOps.fit(Image.fromarray(frame), shape, Image.Resampling.BICUBIC) for frame in frames]
    small = np.stack([np.asarray(frame) for frame in resized])
    return small if pixels.ndim == 4 else small[0]


def to_tensor(pixels: np.ndarray) -> Tensor:
    """``[..., H, W, 3]`` uint8 -> ``[..., 3, H, W]`` float32 in [0, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3).float() / 255


def _times(held: Sequence[int]) -> list[int]:
    """How often each frame is shown, in units of the shortest; once each where the durations are no multiples."""
    shortest = min(held)
    if shortest <= 0 or any(duration % shortest for duration in held):
        return [1] * len(held)
    return [duration // shortest for duration in held]


def _read_video(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"no clip {path}")
    import imageio.v3 as iio

    plugin = video_plugin(path.suffix)
    try:
        return iio.imread(path, plugin=plugin)
    except Exception as error:  # each codec has errors of its own
        raise DataError(f"{path} is not a clip that can be read: {_first_line(error)}") from error


# -- out --------------------------------------------------------------------------------------------------------------


def write_media(path: Path, media: Tensor, fps: float = 16) -> None:
    """Write a picture ``[3, H, W]`` or a clip ``[F, 3, H, W]`` in [0, 1] in one step, as its suffix says.

    png and webp keep every pixel, gif a palette of 256 colours a frame, mp4 what H.264 keeps.

    Raises:
        DataError: see :func:`encode`.
        RunFolderError: the disk refuses.
    """
    write_bytes(path, encode(to_pixels(media[None])[0], path.suffix, fps))


def to_pixels(media: Tensor) -> list[np.ndarray]:
    """Media ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` in [0, 1] -> N times uint8 ``[H, W, 3]`` or ``[F, H, W, 3]``.

    Raises:
        DataError: a sample holds NaN or infinity, which would become black or white pixels.
    """
    broken = [index for index, sample in enumerate(media.detach()) if not bool(sample.isfinite().all())]
    if broken:
        raise DataError(
            f"{len(broken)} of {len(media)} samples hold NaN or infinity, first sample {broken[0]}: the network or its "
            "VAE overflowed. Try generator.dtype bfloat16 or float32 in place of float16, or an earlier checkpoint"
        )
    return list((media.detach().float().clamp(0, 1) * 255).round().byte().cpu().movedim(-3, -1).numpy())


def encode(pixels: np.ndarray, suffix: str, fps: float = 16, *, quality: int | None = None) -> bytes:
    """Pixels as the content of a file.

    Args:
        suffix: ``.png``, ``.jpg``, ``.webp``, ``.gif`` or ``.mp4``.
        fps: frames per second of a clip.
        quality: 1 to 100 for a webp that may lose detail; None keeps every pixel.

    Raises:
        DataError: a clip for a format of pictures, a suffix nobody knows, odd sides or no codec for mp4.
    """
    if suffix == ".mp4":
        return _encode_video(pixels if pixels.ndim == 4 else pixels[None], fps)
    if suffix not in FORMATS:
        raise DataError(f"{suffix!r}: media are written as {', '.join((*FORMATS, '.mp4'))}")
    options: dict[str, Any] = {}
    if pixels.ndim == 4:
        if suffix not in ANIMATED:
            raise DataError(f"a clip does not fit into {suffix}; write {', '.join((*ANIMATED, '.mp4'))}")
        rest = [Image.fromarray(frame) for frame in pixels[1:]]
        options = {"save_all": True, "append_images": rest, "duration": round(1000 / fps), "loop": 0}
    if suffix == ".webp":
        options |= {"lossless": True, "exact": True} if quality is None else {"quality": quality}
    buffer = io.BytesIO()
    Image.fromarray(pixels if pixels.ndim == 3 else pixels[0]).save(buffer, FORMATS[suffix], **options)
    return buffer.getvalue()


def _encode_video(pixels: np.ndarray, fps: float) -> bytes:
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise DataError(f".mp4 needs even sides, this clip has {height} x {width} pixels; write .webp")
    import imageio.v3 as iio

    plugin = video_plugin()
    options: dict[str, Any] = {"fps": fps, "codec": "libx264"}
    if plugin == "FFMPEG":  # sizes as they are, and a quality at which errors are hard to see
        options |= {"macro_block_size": 2, "quality": None, "output_params": ["-crf", "12"]}
    try:
        return iio.imwrite("<bytes>", pixels, extension=".mp4", plugin=plugin, **options)
    except Exception as error:  # each codec has errors of its own
        raise DataError(f".mp4 cannot be written: {_first_line(error)}; write .webp") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def video_plugin(suffix: str = ".mp4") -> str:
    """imageio's reader and writer of video that is installed; raises DataError where none is."""
    for package, plugin in (("imageio_ffmpeg", "FFMPEG"), ("av", "pyav")):
        if find_spec(package) is not None:
            return plugin
    raise DataError(f"{suffix} needs a codec: pip install imageio-ffmpeg, or av")
