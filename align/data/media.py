"""Image and video files: read as pixels or tensors, encoded and written atomically.

Pixels are uint8 ``[H, W, 3]`` or ``[F, H, W, 3]``; torch is imported only for tensors. Pillow reads and writes
images, animated webp and gif; :mod:`align.data.video` the containers of video.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from align.data.files import write_bytes
from align.data.video import VIDEO, encode_video, is_video, read_video, video_size
from alignflow.errors import DataError
from alignflow.files.images import ImageError, check_video, named, opaque, opened, orientation

if TYPE_CHECKING:
    from torch import Tensor

ANIMATED = (".webp", ".gif")
MOVING = ("WEBP", "GIF", "PNG", "AVIF")
"""Formats whose further frames are motion; elsewhere they are pages, previews or the second eye of a camera."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
LONGEST = 256
"""How often a frame that is held is repeated at most; one that is held longer is a pause and counts once."""
STARTS = {
    b"\x89PNG": ".png",
    b"\xff\xd8": ".jpg",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"\x1a\x45": ".webm",
}
"""First bytes of encoded media -> suffix of their files."""
USUAL_FPS = 16
"""Rate of a video whose frames are all equal, if the file gives only its duration."""
_NOTE = re.compile(rb"alignflow: (\d{1,6}) frames, (\d{1,6}(?:\.\d{1,6})?) a second")


@dataclass(frozen=True)
class Recording:
    """Content of a file.

    Args:
        pixels: uint8 ``[H, W, 3]`` of an image, ``[F, H, W, 3]`` of a video.
        fps: frames a second of a video, on average; None of an image, and where the file does not say.
    """

    pixels: np.ndarray
    fps: float | None = None


# -- in ---------------------------------------------------------------------------------------------------------------


def read_media(source: Path | bytes, size: tuple[int, int] | None = None) -> Tensor:
    """An image as ``[3, H, W]`` or a video as ``[F, 3, H, W]``, float32 in [0, 1]; see :func:`read_recording`.

    Args:
        size: (height, width) to resize to, cropped about the middle; the file's own by default.
    """
    return to_tensor(fit(read_pixels(source), size))


def read_pixels(source: Path | bytes) -> np.ndarray:
    """Pixels of an image or video, see :func:`read_recording`."""
    return read_recording(source).pixels


def size_of(source: Path | bytes) -> tuple[int, int]:
    """Height and width in pixels, turned as its camera says; of an image from its header, of a video from one frame.

    Raises:
        DataError: there is no such file, it cannot be read, or needs a codec that is not installed.
    """
    if isinstance(source, Path) and not _there(source):
        raise DataError(f"no file {named(source)}")
    if is_video(source):
        return video_size(source)
    try:
        with opened(source) as image:
            width, height = image.size
            return (width, height) if orientation(image) > 4 else (height, width)  # 5 to 8 lie on their side
    except (ImageError, FileNotFoundError) as error:
        raise DataError(f"{named(source)} is not an image that can be read: {error}") from None


def read_recording(source: Path | bytes) -> Recording:
    """An image or video with its frames a second, turned as its camera says; transparent parts become white.

    Covers, thumbnails and the still that stands in for an animation are not frames. In animated webp, gif and png a
    frame that is held for a whole number of times the shortest is repeated as often, at most :data:`LONGEST` times:
    webp and gif write equal neighbours once. One frame with a duration is a video that stands still. Frames of video
    are read once each, whatever their times.

    Raises:
        DataError: there is no such file, it cannot be read to its end, has more pixels than are allowed (says how to
            allow them), or needs a codec that is not installed.
    """
    if isinstance(source, Path) and not _there(source):
        kind = "video" if source.suffix.lower() in VIDEO else "image"
        raise DataError(f"no {kind} {named(source)}")
    if is_video(source):
        return Recording(*read_video(source))
    try:
        with opened(source) as image:
            if image.format in MOVING:
                return _moving(image, source)
            return Recording(opaque(image))
    except (ImageError, FileNotFoundError) as error:
        raise DataError(f"{named(source)} is not an image that can be read: {error}") from None


def _there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _moving(image: Image.Image, source: Path | bytes) -> Recording:
    first = 1 if getattr(image, "default_image", False) else 0  # a png's still for viewers without animation
    count = getattr(image, "n_frames", 1) - first
    if count > 1:
        check_video(count, *image.size)
    turn, note = orientation(image), _noted(image, source)
    frames = np.empty((count, 0, 0, 3), np.uint8)
    held = []
    for number in range(count):
        if first + number:
            image.seek(first + number)
        pixels = opaque(image, turn)
        if number == 0:
            frames = np.empty((count, *pixels.shape), np.uint8)
        frames[number] = pixels
        held.append(float(image.info.get("duration") or 0))
    times, fps = _times(held, note, str(image.format))
    if count == 1 and fps is None:
        return Recording(frames[0])
    check_video(sum(times), *image.size)
    return Recording(frames if set(times) == {1} else np.repeat(frames, times, axis=0), fps)


def _noted(image: Image.Image, source: Path | bytes) -> tuple[int | None, float] | None:
    """(frames, frames a second) by our own note in the file, or by the index of the samples it lies among."""
    for name in ("comment", "xmp"):
        said = image.info.get(name)
        if isinstance(said, bytes) and (found := _NOTE.search(said)) and float(found[2]) > 0:
            return int(found[1]), float(found[2])
    if not isinstance(source, Path) or source.suffix.lower() not in ANIMATED:
        return None
    try:
        index = json.loads((source.parent / "prompts.json").read_text(encoding="utf-8"))
        fps, video = float(index["fps"]), index["clips"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return (None, fps) if 0 < fps < 1e6 and f".{video}" == source.suffix.lower() else None


def _times(held: Sequence[float], note: tuple[int | None, float] | None, form: str) -> tuple[list[int], float | None]:
    """How often each frame is shown, and frames a second; None where frames have no durations.

    Args:
        held: milliseconds each frame is shown.
        note: see :func:`_noted`.
    """
    if note is not None:
        frames, fps = note
        unit = duration(fps, form)
        times = [max(1, round(ms / unit)) for ms in held]
        if len(held) == 1 and held[0] <= 0:  # webp keeps no duration of a single frame; equal ones were at least two
            times = [frames or 2]
        if frames is None or sum(times) == frames:
            return times, fps
    shortest, total = min(held), sum(held)
    if len(held) == 1:
        if total <= 0 or form == "AVIF":  # still AVIF images have a duration too
            return [1], None
        times = [max(1, min(round(total * USUAL_FPS / 1000), LONGEST))]
        return times, 1000 * times[0] / total
    if shortest <= 0:
        return [1] * len(held), None
    if any(ms % shortest for ms in held):
        return [1] * len(held), 1000 * len(held) / total
    times = [round(ms / shortest) for ms in held]
    return [number if number <= LONGEST else 1 for number in times], 1000 / shortest


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


# -- out --------------------------------------------------------------------------------------------------------------


def write_media(path: Path, media: Tensor, fps: float = 16) -> None:
    """Write an image ``[3, H, W]`` or a video ``[F, 3, H, W]`` in [0, 1] in one step, as its suffix says.

    png and webp keep every pixel, gif a palette of 256 colours a frame, mp4 what H.264 keeps.

    Raises:
        DataError: see :func:`encode`.
        RunFolderError: the disk refuses.
    """
    write_bytes(path, encode(to_pixels(media[None])[0], path.suffix, fps))


def to_bytes(media: Tensor) -> Tensor:
    """Finite media in [0, 1] -> uint8 of the same shape and device, rounded as when saved."""
    return (media.detach().float().clamp(0, 1) * 255).round().byte()


def from_bytes(media: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return media.float() / 255


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
    return list(to_bytes(media).cpu().movedim(-3, -1).numpy())


def encode(pixels: np.ndarray, suffix: str, fps: float = 16, *, quality: int | None = None) -> bytes:
    """Pixels as the content of a file.

    Args:
        suffix: ``.png``, ``.jpg``, ``.webp``, ``.gif`` or ``.mp4``.
        fps: frames per second of a video.
        quality: 1 to 100 for a webp that may lose detail; None keeps every pixel.

    Raises:
        DataError: a video for a format of images, an unknown suffix, odd sides or no codec for mp4.
    """
    if suffix == ".mp4":
        return encode_video(pixels if pixels.ndim == 4 else pixels[None], fps)
    if suffix not in FORMATS:
        raise DataError(f"{suffix!r}: media are written as {', '.join((*FORMATS, '.mp4'))}")
    options: dict[str, Any] = {}
    if pixels.ndim == 4:
        if suffix not in ANIMATED:
            raise DataError(f"a video does not fit into {suffix}; write {', '.join((*ANIMATED, '.mp4'))}")
        rest = [Image.fromarray(frame) for frame in pixels[1:]]
        form = FORMATS[suffix]
        options = {"save_all": True, "append_images": rest, "duration": duration(fps, form), "loop": 0}
        options |= _note(len(pixels), fps, form)
    if suffix == ".webp":
        options |= {"lossless": True, "exact": True} if quality is None else {"quality": quality}
    buffer = io.BytesIO()
    Image.fromarray(pixels if pixels.ndim == 3 else pixels[0]).save(buffer, FORMATS[suffix], **options)
    return buffer.getvalue()


def duration(fps: float, form: str) -> int:
    """Milliseconds that a frame is shown, as a format can say it: gif counts hundredths of a second."""
    unit = 10 if form == "GIF" else 1
    return max(unit, round(1000 / fps / unit) * unit)


def _note(frames: int, fps: float, form: str) -> dict[str, bytes]:
    """Metadata beside the frames: equal neighbours are written once, and durations are rounded."""
    said = f"alignflow: {frames} frames, {fps:.6f} a second"
    if form == "GIF":
        return {"comment": said.encode()}
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" dc:source="{said}"/></rdf:RDF></x:xmpmeta>'
    )
    return {"xmp": packet.encode()}


def suffix_of(content: bytes) -> str:
    """File suffix of an encoded image or video, by its first bytes; ``.mp4`` where no other fits."""
    return next((suffix for start, suffix in STARTS.items() if content.startswith(start)), ".mp4")
