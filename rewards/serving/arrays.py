"""Arrays of a request: npz and PNG, parsed strictly, with every size checked before decoding."""

from __future__ import annotations

import base64
import io
import math
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignflow.errors import AlignflowError
from alignflow.text import first_line
from rewards.serving.limits import Limits

ARRAYS = ("media", "image", "mask")


class WireError(AlignflowError, ValueError):
    """A message that cannot be read; the message gives the reason."""


class Allowance:
    """Remaining images and pixels of a request."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.images, self.total = limits, limits.images, limits.total

    def take(self, name: str, images: int, height: int, width: int) -> None:
        """Count ``images`` of ``height`` x ``width``.

        Raises:
            WireError: they are more or larger than this server takes.
        """
        if not height or not width:
            raise WireError(f"{name} of {height} x {width} have no pixels")
        if height * width > self.limits.pixels:
            raise WireError(
                f"{name} of {height} x {width} are more than this server takes: {self.limits.pixels} pixels an image"
            )
        self.images -= images
        self.total -= images * height * width
        if self.images < 0:
            raise WireError(f"more than {self.limits.images} images and frames in one request; send fewer")
        if self.total < 0:
            raise WireError(f"more than {self.limits.total} pixels in one request; send fewer samples at a time")


def from_npz(text: str, limits: Limits) -> dict[str, Tensor]:
    """Arrays of a base64 npz. Headers, methods and sizes are checked by hand: numpy's own reader trusts them.

    Raises:
        WireError: not such a file, or more than ``limits``.
    """
    allowance = Allowance(limits)
    with zipfile.ZipFile(io.BytesIO(_decoded(text))) as file:
        entries = file.infolist()
        for entry in entries:
            _check_entry(entry)
        if (size := sum(entry.file_size for entry in entries)) > limits.size:
            raise WireError(f"the npz unpacks to {size} bytes, more than the {limits.size} this server takes")
        if len({entry.filename for entry in entries}) < len(entries):
            raise WireError("the npz holds an array twice")
        return {entry.filename.removesuffix(".npy"): _array(file, entry, allowance) for entry in entries}


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename.removesuffix(".npy")
    if name not in ARRAYS or not entry.filename.endswith(".npy"):
        raise WireError(f"the npz should hold {', '.join(f'{known}.npy' for known in ARRAYS)}, given {name[:80]!r}")
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise WireError(f"the npz: {name!r} is encrypted or packed by another method than deflate")


def _array(file: zipfile.ZipFile, entry: zipfile.ZipInfo, allowance: Allowance) -> Tensor:
    name = entry.filename.removesuffix(".npy")
    with file.open(entry) as content:
        version = np.lib.format.read_magic(content)
        if version not in ((1, 0), (2, 0)):
            raise WireError(f"the npz: {name!r} is of npy version {version}")
        read: Callable[..., Any] = np.lib.format.read_array_header_1_0 if version == (1, 0) else _header_2
        shape, fortran, dtype = read(content)
        if dtype != np.float32:
            raise WireError(f"the npz should hold float32 {', '.join(ARRAYS)}; it holds {dtype} {name!r}")
        _check_shape(name, shape)
        allowance.take(name, math.prod(shape[:-3]), *shape[-2:])
        count = math.prod(shape)
        left = entry.file_size - content.tell()
        if left != 4 * count:
            raise WireError(f"the npz: {name!r} claims {list(shape)} of float32, and holds {left} bytes")
        data = bytearray(content.read(left))
    if len(data) != left:
        raise WireError(f"the npz: {name!r} ends early")
    numbers = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32))


def _header_2(content: Any) -> Any:
    return np.lib.format.read_array_header_2_0(content)


def _check_shape(name: str, shape: Any) -> None:
    channels = 1 if name == "mask" else 3
    ranks = (4, 5) if name == "media" else (4,)
    good = all(type(side) is int and side >= 0 for side in shape) and len(shape) in ranks
    if not good or shape[-3] != channels or 0 in shape[:-2]:
        wanted = f"[N, {channels}, H, W]" + (f" or [N, F, {channels}, H, W]" if name == "media" else "")
        raise WireError(f"{name} should be {wanted}, given {list(shape)}")


def from_pngs(images: Mapping[str, Sequence[str | list[str]]], limits: Limits) -> dict[str, Tensor]:
    """Arrays of N base64 PNGs, or of N lists of F.

    Raises:
        WireError: not such images, of several sizes, or more than ``limits``.
    """
    allowance = Allowance(limits)
    contents = {name: _contents(name, items, allowance) for name, items in images.items()}
    return {name: _stacked(name, videos, isinstance(images[name][0], list)) for name, videos in contents.items()}


def _contents(name: str, items: Sequence[str | list[str]], allowance: Allowance) -> list[list[bytes]]:
    """The bytes of every PNG, by sample and frame, after a look at the headers."""
    if name not in ARRAYS:
        raise WireError(f"image arrays must be named {', '.join(ARRAYS)}, given {name[:80]!r}")
    lists = [[item] if isinstance(item, str) else item for item in items]
    if not lists or not all(lists):
        raise WireError(f"{name} holds no image, or a video without frames")
    if name != "media" and any(isinstance(item, list) for item in items):
        raise WireError(f"{name} should be one image a sample, and is a list of frames")
    found, sizes = [], []
    for frames in lists:
        video = [_decoded(text, name) for text in frames]
        shapes = [_png_size(content, name) for content in video]
        for height, width in shapes:
            allowance.take(name, 1, height, width)
        found.append(video)
        sizes.append((len(video), *sorted({f"{height} x {width}" for height, width in shapes})))
    for index, size in enumerate(sizes):
        if size != sizes[0] or len(size) != 2 or isinstance(items[index], str) != isinstance(items[0], str):
            said = [" and ".join(map(str, one[1:])) + (f", {one[0]} frames" if one[0] != 1 else "") for one in sizes]
            raise WireError(
                f"{name} of one request should be of one size: number 0 is {said[0]}, number {index} is {said[index]}; "
                "send each size in a separate request"
            )
    return found


def _stacked(name: str, videos: Sequence[Sequence[bytes]], moving: bool) -> Tensor:
    decoded = np.stack([np.stack([_png(content, name) for content in video]) for video in videos])
    stacked = torch.from_numpy(decoded).movedim(-1, -3).float() / 255
    return stacked if moving else stacked.squeeze(1)


def _png_size(content: bytes, name: str) -> tuple[int, int]:
    """(height, width) by the header alone."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR" or len(content) < 33:
        raise WireError(f"{name}: no readable PNG: it does not begin like one")
    width, height = struct.unpack(">II", content[16:24])
    return height, width


def _png(content: bytes, name: str) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=["png"]) as image:
        pixels = np.asarray(image.convert("L" if name == "mask" else "RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _decoded(text: str, name: str = "the npz") -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise WireError(f"{name} is not base64: {first_line(error)}") from None
