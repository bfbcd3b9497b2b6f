"""Preprocessing is what Pillow, torchvision and transformers make of the same 8-bit image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.base import RewardError
from rewards.networks.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, _pillow_weights, resized

SHAPES = [(32, 32), (64, 64), (50, 90), (91, 35), (17, 40), (33, 32), (37, 300)]


def noise_image(height, width, levels=(0, 256)):
    """The same noise as a Pillow image and as ``[1, 3, H, W]``."""
    pixels = np.random.default_rng(0).integers(*levels, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def normalised(image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 255
    return ((pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)).float()


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_cropped_is_pillow_and_torchvisions_middle(height, width):
    image, media = noise_image(height, width)
    size = (32, int(32 * height / width)) if width <= height else (int(32 * width / height), 32)
    small = image.resize((size[0], height), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - 32) / 2.0) for side in size)  # torchvision's offset
    expected = normalised(small.crop((left, top, left + 32, top + 32)))
    torch.testing.assert_close(Preprocess.cropped(32)(media), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_processor_is_transformers(height, width):
    from transformers import CLIPImageProcessorPil

    image, media = noise_image(
        height, width, levels=(96, 160)
    )  # Pillow 13 resizes some shapes height first: cutting shows
    for options in ({"size": {"shortest_edge": 32}}, {"size": {"height": 32, "width": 40}}, {"do_resize": False}):
        processor = CLIPImageProcessorPil(crop_size={"height": 32, "width": 32}, **options)
        wrong = Preprocess.of_processor(processor)(media) - processor([image], return_tensors="pt")["pixel_values"]
        assert wrong.abs().max() <= 1.01 / 255 / min(CLIP_STD)
        assert (wrong.abs() > 1e-4).float().mean() < 0.35


def test_middles_differ_where_three_lines_are_left():
    media = torch.arange(35.0).view(1, 1, 1, 35).expand(1, 3, 32, 35) / 35
    torchvision = Preprocess((32, 32), "none", (32, 32), middle="even", mean=(0, 0, 0), std=(1, 1, 1))(media)
    transformers = Preprocess((32, 32), "none", (32, 32), middle="down", mean=(0, 0, 0), std=(1, 1, 1))(media)
    assert (torchvision[0, 0, 0, 0] * 35).round() == 2  # round(1.5)
    assert (transformers[0, 0, 0, 0] * 35).round() == 1


@pytest.mark.parametrize(("height", "width"), [(20, 40), (41, 20), (32, 10), (64, 64)])
def test_padded_shows_all_between_black_borders(height, width):
    media = torch.full((2, 3, height, width), 0.5)
    steps = Preprocess.padded(32)
    shown = steps(media) * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    assert shown.shape == (2, 3, 32, 32)
    inner = round(height * 32 / max(height, width)), round(width * 32 / max(height, width))
    top, left = (32 - inner[0]) // 2, (32 - inner[1]) // 2
    expected = torch.zeros(2, 3, 32, 32)
    expected[..., top : top + inner[0], left : left + inner[1]] = 0.5
    torch.testing.assert_close(shown, expected, atol=1e-6, rtol=0)


def test_float_resizing_is_neither_cut_nor_rounded():
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1
    wide = resized(edge, (48, 48))
    assert wide.max() > 1.01
    assert wide.min() < -0.01
    cut = resized(edge, (48, 48), eight_bit=True)
    assert cut.max() == 1
    assert cut.min() == 0
    torch.testing.assert_close(cut * 255, (cut * 255).round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", [(336, 364), (28, 56)])
def test_videos_are_resized_as_torchvision_does_with_8_bit_tensors(target):
    bytes_ = torch.randint(0, 256, (2, 3, 97, 61), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    floats = torch.nn.functional.interpolate(bytes_.float(), target, mode="bicubic", antialias=True)
    media = (bytes_ / 255).requires_grad_()
    found = resized(media, target, eight_bit="tensor")
    assert torch.equal((found * 255).round().byte(), floats.clamp(0, 255).round().byte())
    torch.testing.assert_close(found * 255, (found * 255).round(), atol=1e-4, rtol=0)
    nearly = resized(media.detach() + 0.4 / 255, target, eight_bit="tensor")  # what an image cannot hold is not seen
    assert torch.equal(nearly, found)
    found.mean().backward()
    assert media.grad.abs().sum() > 0


def test_antialias_is_what_it_says():
    _, media = noise_image(128, 128)
    smooth, rough = resized(media, (32, 32)), resized(media, (32, 32), antialias=False)
    assert rough.std() > 2 * smooth.std()
    bigger = torch.rand(1, 3, 8, 8)
    assert Preprocess.padded(32, antialias=False).antialias is False
    assert resized(bigger, (8, 8)) is bigger


def test_gradient_passes_the_rounding():
    _, media = noise_image(64, 48)
    media = (media * 0.5 + 0.25).requires_grad_()
    out = Preprocess((32, 32), "exact", mean=(0, 0, 0), std=(1, 1, 1))(media)
    out.sum().backward()
    assert (media.grad > 0).float().mean() > 0.95
    torch.testing.assert_close(media.grad.sum(), torch.tensor(3 * 32 * 32.0), rtol=1e-3, atol=0)


def test_too_thin_to_show():
    with pytest.raises(RewardError, match="an image of 1 x 1000 is too thin to be shown at 32 x 32"):
        Preprocess.padded(32)(torch.zeros(1, 3, 1, 1000))


@pytest.mark.parametrize(("height", "width"), [(40, 3000), (3000, 40), (2, 30_000)])
def test_long_thin_images_are_cheap_and_the_same(height, width, monkeypatch):
    """Weights of an axis were a matrix of target x size: 27 GB for the last."""
    image, media = noise_image(height, width)
    size = (32, int(32 * height / width)) if width <= height else (int(32 * width / height), 32)
    found = Preprocess.cropped(32)(media)
    assert found.shape == (1, 3, 32, 32)
    if width < 30_000:
        small = image.resize((size[0], height), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)
        left, top = (round((side - 32) / 2.0) for side in size)
        expected = normalised(small.crop((left, top, left + 32, top + 32)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    monkeypatch.setattr("rewards.networks.preprocess.DENSE", 0)
    _pillow_weights.cache_clear()
    assert torch.equal(Preprocess.cropped(32)(media), found)
    _pillow_weights.cache_clear()


def test_sparse_weights_pass_gradients_as_dense_ones_do(monkeypatch):
    slopes = []
    for dense in (1 << 22, 0):
        monkeypatch.setattr("rewards.networks.preprocess.DENSE", dense)
        _pillow_weights.cache_clear()
        media = noise_image(50, 90)[1].requires_grad_()
        (slope,) = torch.autograd.grad(Preprocess.cropped(32)(media).square().sum(), media)
        slopes.append(slope)
    _pillow_weights.cache_clear()
    torch.testing.assert_close(slopes[0], slopes[1])
    assert slopes[0].abs().sum() > 0
