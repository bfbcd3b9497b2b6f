"""Video containers: read frame by frame with timestamps, and written, by ffmpeg or PyAV."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from alignflow.errors import DataError
from alignflow.files.images import IMAGE_LIMIT, ImageError, check_video, limit, named
from alignflow.text import first_line, printable

VIDEO = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
"""Containers that need a codec; mp4 is the one that is written."""
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_HEADS = ((4, b"ftyp"), (0, b"\x1a\x45\xdf\xa3"), (8, b"AVI "))
_IMAGES = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"hevc")

Video = tuple[np.ndarray, float | None]
"""uint8 ``[F, H, W, 3]``, frames a second."""


def is_video(source: Path | bytes) -> bool:
    """Whether a file is a container of video, by its first bytes or, where they do not tell, by its name."""
    if isinstance(source, Path):
        if source.suffix.lower() in VIDEO:
            return True
        try:
            with source.open("rb") as file:
                head = file.read(16)
        except (OSError, ValueError):
            return False
    else:
        head = source[:16]
    return any(head[at:].startswith(mark) for at, mark in _HEADS) and head[8:12] not in _IMAGES


def read_video(source: Path | bytes) -> Video:
    """The frames a video holds, each once, whatever their times, and how many a second that is on average.

    Covers and thumbnails are not frames.

    Raises:
        DataError: not there, damaged, without frames, larger than allowed, or no codec is installed.
    """
    return _in_a_file(source, None)


def video_size(source: Path | bytes) -> tuple[int, int]:
    """Height and width of a video's first frame; raises DataError as :func:`read_video`."""
    height, width = _in_a_file(source, 1)[0].shape[1:3]
    return height, width


def _in_a_file(source: Path | bytes, most: int | None) -> Video:
    if isinstance(source, bytes):
        with tempfile.NamedTemporaryFile(suffix=".video") as file:
            file.write(source)
            file.flush()
            return _read(Path(file.name), "the video", most)
    return _read(source, named(source), most)


def _read(path: Path, name: str, most: int | None) -> Video:
    """At most so many frames; None = all."""
    plugin = video_plugin(path.suffix)
    try:
        frames, times, rate = _ffmpeg(path, most) if plugin == "FFMPEG" else _pyav(path, most)
    except ImageError as error:
        raise DataError(f"{name} is not a video that can be read: {error}") from None
    except Exception as error:  # each codec has errors of its own
        raise DataError(f"{name} is not a video that can be read: {first_line(error)}") from error
    return frames, rate_of(times) or rate


def rate_of(times: Sequence[float]) -> float | None:
    """Frames a second of frames shown at ``times`` (seconds), on average; None if they do not tell."""
    span = times[-1] - times[0] if len(times) > 1 else 0.0
    return (len(times) - 1) / span if span > 0 else None


def _stacked(frames: Iterable[np.ndarray]) -> np.ndarray:
    """Frames of one size ``[F, H, W, 3]``; raises ImageError before they are more than allowed."""
    content, shape, count = bytearray(), None, 0
    for frame in frames:
        shape, count = shape or frame.shape, count + 1
        if frame.shape != shape:
            raise ImageError(f"its frames change their size, {shape[1]} x {shape[0]} at first, later another")
        check_video(count, shape[1], shape[0])
        content += frame.data
    if shape is None:
        raise ImageError("it holds no frames")
    return np.frombuffer(content, np.uint8).reshape(count, *shape)


# -- ffmpeg -----------------------------------------------------------------------------------------------------------


def _ffmpeg(path: Path, most: int | None) -> tuple[np.ndarray, list[float], float | None]:
    import imageio_ffmpeg

    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "level+info",
        "-protocol_whitelist", "file", "-format_whitelist", _CONTAINERS, "-max_pixels", str(limit(IMAGE_LIMIT)),
        "-i", f"file:{path}", "-map", "0:V:0", "-vf", "showinfo=checksum=0", "-fps_mode", "passthrough",
        "-pix_fmt", "rgb24", "-c:v", "ppm", *(("-frames:v", str(most)) if most else ()), "-f", "image2pipe", "-",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, stdin=subprocess.DEVNULL)
        try:
            pixels = _stacked(_ppms(process.stdout))
            wrong = None
        except ImageError as error:
            wrong = error
        finally:
            process.kill() if process.stdout and process.stdout.read(1) else None
            process.stdout.close() if process.stdout else None
            code = process.wait()
        said.seek(0)
        log = said.read().decode("utf-8", "replace")
    errors = [line for line in log.splitlines() if re.search(r"\[(error|fatal|panic)\]", line)]
    if wrong is not None and "no frames" not in str(wrong):
        raise wrong
    if errors or code or wrong is not None:
        raise ImageError(_why(errors) or str(wrong or f"ffmpeg ended with {code}"))
    times = [float(found) for found in re.findall(r"Parsed_showinfo.* pts_time:([-\d.]+)", log)]
    rate = re.search(r"Stream #0.*Video:.* ([\d.]+) fps", log)
    return pixels, times, float(rate[1]) or None if rate else None


def _why(errors: Sequence[str]) -> str:
    """The first error of ffmpeg's, without the names of its parts."""
    return printable(re.sub(r"\[[^]]*\] ", "", errors[0]), 200) if errors else ""


def _ppms(file: Any) -> Iterator[np.ndarray]:
    while head := file.readline(32):
        try:
            width, height = map(int, file.readline(32).split())
        except ValueError:
            raise ImageError("its frames cannot be decoded") from None
        file.readline(8)
        check_video(1, width, height)
        content = file.read(width * height * 3)
        if head != b"P6\n" or len(content) != width * height * 3:
            raise ImageError("its last frame is cut")
        yield np.frombuffer(content, np.uint8).reshape(height, width, 3)


# -- PyAV -------------------------------------------------------------------------------------------------------------


def _pyav(path: Path, most: int | None) -> tuple[np.ndarray, list[float], float | None]:
    import av

    times: list[float] = []

    def frames(container: Any, stream: Any) -> Iterator[np.ndarray]:
        check_video(1, stream.codec_context.width, stream.codec_context.height)
        for frame in islice(container.decode(stream), most):
            check_video(len(times) + 1, frame.width, frame.height)
            times.append(float(frame.time if frame.time is not None else len(times)))
            turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))

    with av.open(str(path)) as container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            raise ImageError("it holds no video")
        rate = streams[0].average_rate
        return _stacked(frames(container, streams[0])), times, float(rate) if rate else None


def _is_cover(stream: Any) -> bool:
    return "attached_pic" in str(getattr(stream, "disposition", "")).lower()


# -- out --------------------------------------------------------------------------------------------------------------


def encode_video(pixels: np.ndarray, fps: float) -> bytes:
    """uint8 ``[F, H, W, 3]`` as an mp4; raises DataError for odd sides, or where no codec is installed."""
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise DataError(f".mp4 needs even sides, this video has {height} x {width} pixels; write .webp")
    import imageio.v3 as iio

    plugin = video_plugin()
    options: dict[str, Any] = {"fps": fps, "codec": "libx264"}
    if plugin == "FFMPEG":  # sizes as they are, and a quality at which errors are hard to see
        options |= {"macro_block_size": 2, "quality": None, "output_params": ["-crf", "12"]}
    try:
        return iio.imwrite("<bytes>", pixels, extension=".mp4", plugin=plugin, **options)
    except Exception as error:  # each codec has errors of its own
        raise DataError(f".mp4 cannot be written: {first_line(error)}; write .webp") from error


def video_plugin(suffix: str = ".mp4") -> str:
    """imageio's reader and writer of video that is installed; raises DataError if none is."""
    for package, plugin in (("imageio_ffmpeg", "FFMPEG"), ("av", "pyav")):
        if find_spec(package) is not None:
            return plugin
    raise DataError(f"{suffix} needs a codec: pip install imageio-ffmpeg, or av")
