"""Images and videos that are cut, flipped, mixed and claim anything: read, or refused in words."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from harness import failures
from PIL import Image

from align.data.media import encode, fit, read_recording, to_tensor
from alignflow.errors import DataError

TOTAL, SEED = 2000, 16
RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def originals() -> dict[str, bytes]:
    """A whole file of every kind that is read."""
    first, *rest = (Image.fromarray(frame) for frame in VIDEO)
    moving = {"save_all": True, "append_images": rest, "duration": [40, 80, 120, 40]}
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "image.png": saved(first, "PNG", exif=exif),
        "grey16.png": saved(Image.fromarray(VIDEO[0, ..., 0].astype(np.uint16) * 257), "PNG"),
        "palette.png": saved(first.convert("P"), "PNG", transparency=3),
        "animated.png": saved(first, "PNG", default_image=True, **moving),
        "image.jpg": saved(first, "JPEG", exif=exif),
        "cmyk.jpg": saved(first.convert("CMYK"), "JPEG"),
        "image.webp": saved(first, "WEBP", lossless=True),
        "clip.webp": saved(first, "WEBP", **moving),
        "clip.gif": saved(first, "GIF", **moving),
        "ours.gif": encode(VIDEO, ".gif", 12),
        "image.bmp": saved(first, "BMP"),
        "image.tiff": saved(first, "TIFF", compression="tiff_lzw"),
        "float.tiff": saved(Image.fromarray(VIDEO[0, ..., 0] / np.float32(255)), "TIFF"),
        "image.ppm": saved(first, "PPM"),
        "clip.mp4": encode(VIDEO, ".mp4", 12),
    }
    if "AVIF" in Image.SAVE or (Image.init() and "AVIF" in Image.SAVE):
        found |= {"image.avif": saved(first, "AVIF"), "clip.avif": saved(first, "AVIF", **{**moving, "duration": 40})}
    return found


def claims(content: bytes, rng: random.Random) -> bytes:
    """A png, gif, bmp or other header that says the image is huge, with checksums that fit."""
    size = rng.choice([(1, 2**31 - 1), (2**20, 2**20), (65535, 65535), (20_000, 20_000), (0, 7)])
    if content.startswith(b"\x89PNG"):
        head = struct.pack(">II", *size) + content[24:29]
        return content[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + content[33:]
    if content.startswith(b"GIF"):
        return content[:6] + struct.pack("<HH", *(min(side, 65535) for side in size)) + content[10:]
    if content.startswith(b"BM"):
        return content[:18] + struct.pack("<ii", *size) + content[26:]
    place = rng.randrange(max(len(content) - 8, 1))
    return content[:place] + struct.pack(">II", *size) + content[place + 8 :]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def head_flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2, 4])):
        changed[rng.randrange(min(len(changed), 160))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    return bytes(changed)


def swapped(content: bytes, rng: random.Random) -> bytes:
    one, other, size = rng.randrange(len(content)), rng.randrange(len(content)), rng.randrange(1, 64)
    changed = bytearray(content)
    changed[one : one + size] = content[other : other + size]
    return bytes(changed)


def grown(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + rng.randbytes(rng.randrange(1, 300)) + content[place:]


def held(content: bytes, rng: random.Random) -> bytes:
    """Frames shown for any time at all."""
    changed, start = bytearray(content), 0
    for mark, at in ((b"\x21\xf9\x04", 4), (b"ANMF", 20), (b"fcTL", 24)):
        while (start := changed.find(mark, start)) >= 0:
            changed[start + at : start + at + 2] = rng.choice([b"\0\0", b"\xff\xff", b"\x01\0", rng.randbytes(2)])
            start += 4
        start = 0
    return bytes(changed)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    cut, flipped, flipped, head_flipped, head_flipped, swapped, grown, claims, held,
)  # fmt: skip


def look(path: Path) -> None:
    """What scoring and training do with a file."""
    found = read_recording(path)
    to_tensor(fit(found.pixels[:8] if found.pixels.ndim == 4 else found.pixels, (32, 32)))


def cases(folder: Path, count: int) -> Iterator[tuple[str, Callable[[], object]]]:
    whole = originals()
    names, few = list(whole), {name for name in whole if name.endswith((".mp4", ".webm"))}
    for number in range(count):
        rng = random.Random(f"{SEED} {number}")
        name = rng.choice(names)
        if name in few and number % 3:  # each starts a program
            name = rng.choice([other for other in names if other not in few])
        mutate = rng.choice(MUTATIONS)
        content = mutate(whole[name], rng)
        if rng.random() < 0.2:
            content = rng.choice(MUTATIONS)(content or b"x", rng)
        path = folder / (name if rng.random() < 0.95 else rng.choice(names))
        path.write_bytes(content)
        yield f"{number} {mutate.__name__} of {name} as {path.name}", partial(look, path)


def test_damaged_media_are_read_or_refused_in_words(share, tmp_path):
    count, found = failures(cases(tmp_path, int(TOTAL * share)), (DataError,))
    assert count == int(TOTAL * share)
    assert not found, "\n".join(found)


def test_whole_files_are_read(tmp_path):
    """What is mutated is right to begin with."""
    for name, content in originals().items():
        (tmp_path / name).write_bytes(content)
        assert read_recording(tmp_path / name).pixels.shape[-3:] in ((32, 48, 3), (48, 32, 3))
