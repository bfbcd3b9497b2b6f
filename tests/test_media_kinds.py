"""Files as others write them: every mode of image, what is hidden in a container, and the time of videos."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageCms

from align.data.media import encode, read_media, read_pixels, read_recording
from alignflow.errors import DataError
from alignflow.files.images import IMAGE_LIMIT, VIDEO_LIMIT

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
VIDEO = np.random.default_rng(1).integers(0, 3, (5, 16, 24, 3), dtype=np.uint8) * 100


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, rows: list[bytes], size: tuple[int, int], key: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + (chunk(b"tRNS", key) if key else b"") + data + chunk(b"IEND", b"")


# -- modes ------------------------------------------------------------------------------------------------------------

DEEP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(4, 256)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (saved(Image.fromarray(DEEP), "PNG"), DEEP >> 8),
        (saved(Image.fromarray(DEEP), "TIFF"), DEEP >> 8),
        (saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}), 255 - (DEEP >> 8)),
        (saved(Image.fromarray(DEEP), "PPM"), DEEP >> 8),
        (b"P5 256 4 65535\n" + DEEP.astype(">u2").tobytes(), DEEP >> 8),
        (saved(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"), RAMP),
        (saved(Image.fromarray(RAMP), "PNG"), RAMP),
        (saved(Image.fromarray(RAMP > 99), "PNG"), np.where(RAMP > 99, 255, 0)),
        (saved(Image.fromarray(RAMP).convert("P"), "PNG"), RAMP),
        (saved(Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (256, 4), 255)]), "PNG"), RAMP),
        (png(2, 0, [bytes([0b00011011])], (4, 1), struct.pack(">H", 1)), [[0, 255, 170, 255]]),
        (png(4, 0, [bytes([0x01, 0x2F])], (4, 1), struct.pack(">H", 2)), [[0, 17, 255, 255]]),
        (png(16, 0, [struct.pack(">2H", 0x1234, 0x5600)], (2, 1), struct.pack(">H", 0x1234)), [[255, 0x56]]),
    ],
    ids=lambda value: "",
)
def test_grey_of_any_depth(content, expected):
    found = read_pixels(content)
    assert np.array_equal(found[..., 0], np.asarray(expected))
    assert np.array_equal(found, found[..., :1].repeat(3, -1))


def test_colours_of_any_depth_and_kind():
    rows = [row.astype(">u2").tobytes() for row in COLOURS.astype(np.uint16) * 256 + 7]
    assert np.array_equal(read_pixels(png(16, 2, rows, (24, 16))), COLOURS)
    first = struct.pack(">3H", *(COLOURS[0, 0].astype(int) * 256 + 7))
    assert (read_pixels(png(16, 2, rows, (24, 16), first))[0, 0] == 255).all()
    image = Image.fromarray(COLOURS)
    assert np.array_equal(read_pixels(saved(image.convert("CMYK"), "TIFF")), COLOURS)
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(read_pixels(saved(lab, "TIFF")).astype(int) - COLOURS).mean() < 4  # 8 bits of Lab are coarse
    clear = image.copy()
    clear.putalpha(Image.new("L", image.size, 0))
    assert (read_pixels(saved(clear, "PNG")) == 255).all()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (RAMP.astype(np.int32) * 999, "32-bit or signed integers, which have no scale"),
        (RAMP.astype(np.float32), "floating-point numbers from 0 to 255"),
        (np.full((2, 2), np.nan, np.float32), "floating-point numbers from nan to nan"),
        (np.full((2, 2), -0.5, np.float32), "floating-point numbers from -0.5"),
    ],
)
def test_numbers_without_a_scale_are_refused(values, says):
    with pytest.raises(DataError, match=says):
        read_pixels(saved(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_and_an_odd_exif(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    from PIL import ImageOps

    content = saved(Image.fromarray(COLOURS), "PNG", exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_pixels(content), expected)
    # a type that nobody knows in the entry after the orientation, which nothing could rewrite
    entries = (
        struct.pack("<H", 2) + struct.pack("<HHIHH", 0x0112, 3, 1, turn, 0) + struct.pack("<HHII", 0x9999, 99, 1, 0)
    )
    odd = b"Exif\0\0II*\0\x08\0\0\0" + entries + struct.pack("<I", 0)
    assert np.array_equal(read_pixels(saved(Image.fromarray(COLOURS), "PNG", exif=odd)), expected)


# -- frames that are none ---------------------------------------------------------------------------------------------


def test_the_still_of_an_animated_png_is_no_frame():
    still, *frames = (Image.fromarray(frame) for frame in VIDEO)
    content = saved(still, "PNG", save_all=True, append_images=frames, default_image=True, duration=100)
    found = read_recording(content)
    assert np.array_equal(found.pixels, VIDEO[1:])
    assert found.fps == pytest.approx(10)
    alone = saved(still, "PNG", save_all=True, append_images=frames[:1], default_image=True, duration=500)
    assert np.array_equal(read_pixels(alone), np.stack([VIDEO[1]] * 8))


def test_an_avif_is_an_image_or_a_video():
    frames = [Image.fromarray(np.full((16, 24, 3), value, np.uint8)) for value in (0, 120, 240)]
    try:
        single = saved(frames[0], "AVIF")
    except (KeyError, OSError):
        pytest.skip("this Pillow writes no avif")
    assert read_pixels(single).shape == (16, 24, 3)
    found = read_recording(saved(frames[0], "AVIF", save_all=True, append_images=frames[1:], duration=50))
    assert found.pixels.shape == (3, 16, 24, 3)
    assert found.fps == pytest.approx(20)


def ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def video(tmp_path):
    """Ten different grey frames of a second, as an mp4."""
    frames = np.stack([np.full((32, 48, 3), 20 * i + 20, np.uint8) for i in range(10)])
    (tmp_path / "clip.mp4").write_bytes(encode(frames, ".mp4", fps=10))
    return tmp_path / "clip.mp4"


def levels(pixels: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 20) * 20 for frame in pixels]


def test_a_cover_is_no_frame(video, tmp_path):
    Image.new("RGB", (640, 480), "red").save(tmp_path / "cover.png")
    for streams in (("1", "0"), ("0", "1")):  # the cover before or after the video
        maps = [word for stream in streams for word in ("-map", stream)]
        cover = f"-disposition:v:{streams.index('1')}"
        ffmpeg(
            "-i", video, "-i", tmp_path / "cover.png", *maps, "-c", "copy", cover, "attached_pic", tmp_path / "c.mp4"
        )
        found = read_recording(tmp_path / "c.mp4")
        assert found.pixels.shape == (10, 32, 48, 3)
        assert levels(found.pixels) == [20 * i + 20 for i in range(10)]
        assert found.fps == pytest.approx(10)


def test_a_variable_rate_keeps_its_frames(video, tmp_path):
    for name in ("varied.mp4", "varied.webm"):
        codec = ["-c:v", "libvpx-vp9", "-lossless", "1"] if name.endswith("webm") else ["-crf", "5"]
        times = "setpts='(N+if(gt(N,5),72,0))/10/TB'"  # a pause of more than 7 s before the seventh frame
        ffmpeg("-i", video, "-vf", f"settb=1/1000,{times}", "-fps_mode", "passthrough", *codec, tmp_path / name)
        found = read_recording(tmp_path / name)
        assert levels(found.pixels) == [20 * i + 20 for i in range(10)]
        assert found.fps == pytest.approx(9 / 8.1, rel=0.01)


def test_a_video_of_one_frame_is_a_video(tmp_path):
    (tmp_path / "one.mp4").write_bytes(encode(VIDEO[:1], ".mp4", fps=12))
    found = read_recording(tmp_path / "one.mp4")
    assert found.pixels.shape == (1, 16, 24, 3)
    assert found.fps == pytest.approx(12)
    assert read_media((tmp_path / "one.mp4").read_bytes()).shape == (1, 3, 16, 24)  # as a cell of a dataset


def test_a_damaged_video_is_refused(video, tmp_path):
    content = video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    ffmpeg("-i", video, "-c", "copy", "-movflags", "faststart", tmp_path / "front.mp4")
    front = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "cut2.mp4").write_bytes(front[:-200])
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nclip.mp4\n")
    for name in ("cut.mp4", "cut2.mp4", "list.mp4"):
        with pytest.raises(DataError, match=rf"{name} is not a video that can be read: ."):
            read_pixels(tmp_path / name)


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [8, 12, 15, 16, 23.976, 24, 25, 30, 60])
@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_the_rate_survives_writing_and_reading(suffix, fps):
    content = encode(VIDEO[[0, 1, 1, 1, 2]], suffix, fps)
    found = read_recording(content)
    assert np.array_equal(found.pixels, VIDEO[[0, 1, 1, 1, 2]])
    assert found.fps == pytest.approx(fps, abs=1e-5)
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        unit = 10 if suffix == ".gif" else 1
        assert abs(image.info["duration"] - 1000 / fps) <= unit / 2  # rounded to what the format can say


def test_the_rate_of_an_mp4(tmp_path):
    for fps in (8, 23.976, 30):
        (tmp_path / "x.mp4").write_bytes(encode(VIDEO, ".mp4", fps))
        assert read_recording(tmp_path / "x.mp4").fps == pytest.approx(fps, rel=1e-3)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_a_video_that_stands_still_stays_a_video(suffix):
    for frames in (1, 2, 5, 300):
        found = read_recording(encode(VIDEO[[0] * frames], suffix, 15))
        assert found.pixels.shape == (frames, 16, 24, 3)
        assert found.fps == pytest.approx(15)


def test_a_still_video_of_others_is_known_by_its_duration_or_its_index(tmp_path):
    frames = [Image.fromarray(VIDEO[0])] * 4
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    found = read_recording(content)
    assert (len(found.pixels), found.fps) == (6, pytest.approx(15))  # 0.4 s at about 16 a second
    (tmp_path / "000.gif").write_bytes(content)
    webp = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    (tmp_path / "001.webp").write_bytes(webp)
    assert read_pixels(tmp_path / "001.webp").ndim == 3
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": ["a"], "fps": 10, "clips": "gif"}))
    found = read_recording(tmp_path / "000.gif")
    assert (len(found.pixels), found.fps) == (4, 10)
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": ["a"], "fps": 10, "clips": "webp"}))
    assert read_pixels(tmp_path / "001.webp").ndim == 4
    assert read_pixels(saved(frames[0], "GIF")).ndim == 3


# -- size -------------------------------------------------------------------------------------------------------------


def test_a_frame_that_is_held_for_long_is_a_pause():
    frames = [Image.fromarray(np.full((512, 512, 3), value, np.uint8)) for value in (0, 200)]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        for hold, count in ((2000, 201), (5000, 2), (655_000, 2)):
            content = saved(frames[0], form, save_all=True, append_images=frames[1:], duration=[10, hold], **options)
            assert len(content) < 12_000
            found = read_recording(content)
            assert (len(found.pixels), found.fps) == (count, 100)


@pytest.mark.slow
def test_limits_are_named_and_can_be_raised(tmp_path, monkeypatch):
    big = saved(Image.new("L", (12_000, 12_000)), "PNG", compress_level=1)
    with pytest.raises(DataError, match=r"12000 x 12000 pixels .* set ALIGNFLOW_IMAGE_PIXELS=144000000 to read it"):
        read_pixels(big)
    frames = [Image.new("L", (2000, 2000), value) for value in range(150)]
    gif = saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    with pytest.raises(DataError, match=r"150 frames of 2000 x 2000 .* set ALIGNFLOW_VIDEO_PIXELS=600000000"):
        read_pixels(gif)
    (tmp_path / "x.mp4").write_bytes(encode(VIDEO, ".mp4"))
    monkeypatch.setenv(VIDEO_LIMIT[0], str(4 * 4096))
    for source in (encode(VIDEO, ".webp"), tmp_path / "x.mp4"):
        with pytest.raises(DataError, match=r"5 frames of 24 x 16 are more than the 16384 pixels"):
            read_pixels(source)
    monkeypatch.setenv(VIDEO_LIMIT[0], str(5 * 4096))
    assert len(read_pixels(encode(VIDEO, ".webp"))) == len(read_pixels(tmp_path / "x.mp4")) == 5
    monkeypatch.setenv(IMAGE_LIMIT[0], "100")
    with pytest.raises(DataError, match=r"x\.mp4 is not a video that can be read: "):
        read_pixels(tmp_path / "x.mp4")
    monkeypatch.setenv(IMAGE_LIMIT[0], "many")
    with pytest.raises(DataError, match="ALIGNFLOW_IMAGE_PIXELS should be a number of pixels, given 'many'"):
        read_pixels(encode(COLOURS, ".png"))
