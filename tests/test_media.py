"""Images and videos go to files and come back: what is exact is exact, what loses detail loses a stated amount."""

from __future__ import annotations

import io
import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from align.data import video
from align.data.media import encode, fit, read_media, read_pixels, to_pixels, write_media
from alignflow.errors import DataError, RunFolderError

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
VIDEO = np.random.default_rng(1).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)


def moving(frames: int = 9, side: int = 64) -> np.ndarray:
    """A bright disc that wanders over a gradient, as video looks: smooth."""
    y, x = np.mgrid[:side, :side] / side
    places = np.linspace(0.25, 0.75, frames)
    disc = np.stack([1 / (1 + np.exp(40 * (np.hypot(x - at, y - 0.5) - 0.2))) for at in places])
    colours = np.stack([0.2 + 0.6 * disc, np.broadcast_to(x, disc.shape), 0.5 * (1 - disc) + 0.2], -1)
    return (colours * 255).round().astype(np.uint8)


def as_media(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).movedim(-1, -3).float() / 255


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pixels", "suffix"), [(IMAGE, ".png"), (IMAGE, ".webp"), (VIDEO, ".webp")])
def test_png_and_webp_keep_every_pixel(tmp_path, pixels, suffix):
    path = tmp_path / f"x{suffix}"
    write_media(path, as_media(pixels))
    assert np.array_equal(read_pixels(path), pixels)
    assert torch.equal(read_media(path), as_media(pixels))
    assert np.array_equal(read_pixels(path.read_bytes()), pixels)


def test_gif_is_exact_within_its_palette(tmp_path):
    write_media(tmp_path / "x.gif", as_media(VIDEO // 86 * 86))  # 3 levels a channel: 27 colours
    assert np.array_equal(read_pixels(tmp_path / "x.gif"), VIDEO // 86 * 86)
    write_media(tmp_path / "y.gif", as_media(moving()))
    error = np.abs(read_pixels(tmp_path / "y.gif").astype(int) - moving())
    assert 0 < error.mean() < 1.5


def test_jpeg_and_lossy_webp_come_close():
    image = moving()[0]
    for content in (encode(image, ".jpg"), encode(image, ".webp", quality=90)):
        assert np.abs(read_pixels(content).astype(int) - image).mean() < 3


@pytest.mark.parametrize("package", ["imageio_ffmpeg", "av"])
def test_mp4_comes_close(tmp_path, monkeypatch, package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(video, "find_spec", lambda name: name == package or None)
    write_media(tmp_path / "x.mp4", as_media(moving()), fps=8)
    back = read_pixels(tmp_path / "x.mp4")
    assert back.shape == moving().shape
    error = np.abs(back.astype(int) - moving())
    assert error.mean() < 3
    assert error.max() < 60  # at edges: colours are stored at half the sides


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_frames_that_do_not_change_are_not_lost(suffix):
    video = (VIDEO // 86 * 86)[[0, 1, 1, 2, 2, 2, 0]]
    assert np.array_equal(read_pixels(encode(video, suffix)), video)


def test_durations_without_a_common_unit_count_once():
    buffer = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in VIDEO[:3])
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=[40, 70, 90], lossless=True)
    assert np.array_equal(read_pixels(buffer.getvalue()), VIDEO[:3])


def test_pixels_are_rounded_and_cut():
    values = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.7]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    assert [int(pixels[0, 0, 0]) for pixels in to_pixels(values)] == [0, 0, 128, 255, 255]


# -- reading ----------------------------------------------------------------------------------------------------------


def test_transparency_becomes_white_and_the_camera_is_believed(tmp_path):
    clear = np.dstack([IMAGE, np.zeros((16, 24), np.uint8)])
    clear[:, 12:, 3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    back = read_pixels(tmp_path / "clear.png")
    assert (back[:, :12] == 255).all()
    assert np.array_equal(back[:, 12:], IMAGE[:, 12:])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(IMAGE).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_pixels(tmp_path / "turned.png"), np.rot90(IMAGE, -1))
    Image.fromarray(IMAGE[:, :, 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_pixels(tmp_path / "grey.png"), IMAGE[:, :, :1].repeat(3, 2))


def test_previews_inside_a_photo_are_no_motion(tmp_path):
    for name, form in (("photo.jpg", "MPO"), ("pages.tiff", "TIFF")):
        first, second = Image.fromarray(IMAGE), Image.fromarray(255 - IMAGE)
        first.save(tmp_path / name, form, save_all=True, append_images=[second])
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 2
        assert read_pixels(tmp_path / name).shape == IMAGE.shape
    assert np.array_equal(read_pixels(tmp_path / "pages.tiff"), IMAGE)


def test_a_size_crops_about_the_middle():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert (fit(wide, (8, 8)) == 255).all()
    assert (fit(wide, (4, 4))[:, 1:3] == 255).all()
    assert fit(np.stack([wide] * 2), (8, 12)).shape == (2, 8, 12, 3)
    assert fit(wide, (8, 24)) is wide
    assert fit(wide, None) is wide


def test_files_that_cannot_be_read_say_so(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "text.mp4").write_text("not a video")
    torn = encode(VIDEO, ".webp")
    (tmp_path / "torn.webp").write_bytes(torn[: len(torn) // 2])
    (tmp_path / "torn.png").write_bytes(encode(IMAGE, ".png")[:600])
    for name, says in (
        ("gone.png", "no image .*gone.png"),
        ("gone.mp4", "no video .*gone.mp4"),
        ("text.png", "text.png is not an image that can be read"),
        ("text.mp4", "text.mp4 is not a video that can be read"),
        ("torn.webp", "torn.webp is not an image that can be read"),
        ("torn.png", "torn.png is not an image that can be read"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            read_pixels(tmp_path / name)
        assert "\n" not in str(caught.value)


# -- writing ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    for pixels, suffix, says in (
        (VIDEO, ".png", "a video does not fit into .png; write .webp, .gif, .mp4"),
        (IMAGE, ".tiff", "'.tiff': media are written as .png, .jpg"),
        (VIDEO[:, :15], ".mp4", "needs even sides, this video has 15 x 24 pixels"),
    ):
        with pytest.raises(DataError, match=says):
            encode(pixels, suffix)
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"\.mp4 needs a codec: pip install imageio-ffmpeg, or av"):
        encode(VIDEO, ".mp4")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.webp"
    write_media(path, as_media(IMAGE))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match="No space left"):
        write_media(path, as_media(VIDEO))
    assert np.array_equal(read_pixels(path), IMAGE)
    assert [file.name for file in tmp_path.iterdir()] == ["x.webp"]


def test_the_speed_is_written():
    with Image.open(io.BytesIO(encode(VIDEO, ".gif", fps=10))) as image:
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0
