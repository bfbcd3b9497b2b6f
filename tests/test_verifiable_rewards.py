"""Rewards that need no judge's opinion: size, structure, text read, boxes, GenEval's rules."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

import rewards
from rewards.base import RewardError

NOISE = torch.rand(4, 3, 24, 32, generator=torch.Generator().manual_seed(0))
FLAT = torch.full((1, 3, 24, 32), 0.5)


def build(kind, **options):
    return rewards.parse({"kind": kind, **options}).build()


def test_compressibility_is_the_size_of_the_file(tmp_path):
    media = torch.cat([FLAT, NOISE[:1]])
    values = build("compressibility")(media, ["a", "b"]).values
    for image, value in zip(media, values, strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
        assert value == pytest.approx(-(tmp_path / "x.jpg").stat().st_size / 1000)
    assert values[0] > values[1]
    assert torch.equal(build("compressibility", prefer="large")(media, ["a", "b"]).values, -values)
    clip = build("compressibility")(media[None], ["a"]).values
    assert clip.item() == pytest.approx(values.mean().item())
    broken = FLAT.clone()
    broken[0, 0, 0, 0] = math.nan
    assert build("compressibility")(broken, ["a"]).reasons == {0: "the media hold NaN or infinity"}


def reference_ssim(x, y):
    """scikit-image's formula on scipy's filter, one channel; windows that hang over the border are cut off."""

    def mean(values):
        return gaussian_filter(values, 1.5, truncate=3.5)

    ux, uy = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - ux * ux, mean(y * y) - uy * uy, mean(x * y) - ux * uy
    top, bottom = (2 * ux * uy + 1e-4) * (2 * vxy + 9e-4), (ux**2 + uy**2 + 1e-4) * (vx + vy + 9e-4)
    return (top / bottom)[5:-5, 5:-5].mean()


def test_ssim_is_the_published_formula():
    near = (NOISE + 0.2 * NOISE.flip(0)).clamp(0, 1)
    values = build("ssim")(near, list("abcd"), None, {"image": NOISE}).values
    for x, y, value in zip(near.double().numpy(), NOISE.double().numpy(), values, strict=True):
        assert value == pytest.approx(np.mean([reference_ssim(a, b) for a, b in zip(x, y, strict=True)]), abs=1e-5)
    assert build("ssim")(NOISE, list("abcd"), None, {"image": NOISE}).values.tolist() == pytest.approx([1] * 4)
    black, white = torch.zeros_like(FLAT), torch.ones_like(FLAT)
    assert build("ssim")(black, ["a"], None, {"image": white}).values.item() == pytest.approx(1e-4 / (1 + 1e-4))


def test_ssim_of_clips_leads_to_the_image():
    clip = NOISE[None].clone().requires_grad_()
    image = NOISE[:1]
    reward = build("ssim", chunk=3)
    value = reward(clip, ["a"], None, {"image": image}).values
    each = reward(NOISE, list("abcd"), None, {"image": image.expand(4, -1, -1, -1)}).values
    assert value.item() == pytest.approx(each.mean().item(), abs=1e-6)
    value.sum().backward()
    better = (clip + 0.5 * clip.grad / clip.grad.abs().max()).detach()
    assert reward(better, ["a"], None, {"image": image}).values > value
    with pytest.raises(RewardError, match="equally large"):
        reward(NOISE[:1], ["a"], None, {"image": NOISE[:1, :, :20]})


def test_text_asked_for_is_the_column_or_the_quotation():
    from rewards.verifiers.ocr import closeness, edit_distance, wanted_text

    assert wanted_text('a sign says "STOP" or "GO"', {}) == "STOP"
    assert wanted_text('a sign says "STOP"', {"text": "WAIT"}) == "WAIT"
    for prompt, row, said in [
        ("a sign", {}, "no 'text'"),
        ("a sign", {"text": " "}, "empty"),
        ("", {"text": 5}, "str"),
    ]:
        with pytest.raises(ValueError, match=said):
            wanted_text(prompt, row)
    pairs = [("", ""), ("abc", ""), ("", "ab"), ("flaw", "lawn"), ("ab", "ba")]
    assert [edit_distance(*pair) for pair in pairs] == [0, 3, 2, 2, 2]
    # the distance counts up to the length: five letters wrong of five are 0, so are fifty
    assert [closeness(seen, "hello") for seen in ["hallo", "HEL LO", "oh hello there", "", "x" * 50]] == [
        0.8,
        1,
        1,
        0,
        0,
    ]


def test_ocr_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    with pytest.raises(RewardError, match=r"needs the package rapidocr, .*pip install 'rapidocr>=3'"):
        build("ocr")


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason="the extra ocr is not installed")
def test_ocr_reads_drawn_words():
    image = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(image).text((24, 24), "NEW YORK", fill="black", font=ImageFont.load_default(40))
    drawn = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    media = torch.cat([drawn, drawn, torch.ones_like(drawn), drawn])
    prompts = ['a sign that says "New York"', "a sign", 'a sign "New York"', "a sign"]
    reward = build("ocr")
    scores = reward(media, prompts, None, {"metadata": [{}, {"text": "NEW FORK"}, {}, {}]})
    assert scores.values[:3].tolist() == pytest.approx([1, 6 / 7, 0])
    assert "no 'text'" in scores.reasons[3]
    clip = torch.stack([drawn[0], torch.ones_like(drawn[0])])[None]
    assert reward(clip, prompts[:1], None, {"metadata": [{}]}).values.item() == 0.5
