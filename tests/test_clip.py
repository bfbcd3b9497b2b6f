"""The CLIP reward is transformers' CLIP on tensors: same numbers, and gradients to the pixels."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image

from rewards.base import RewardError
from rewards.encoders.clip import ClipReward

PROMPTS = ["a", "b", "b"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny.clip_model(tmp_path_factory.mktemp("clip"))


def reference(folder, images, prompts):
    """Cosine by transformers' own model, tokenizer and image processor on 8-bit images."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    text = AutoTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**pixels, **text)
    return (out.image_embeds * out.text_embeds).sum(-1), model.logit_scale.exp().item()


def eight_bit(count, height, width):
    """The same images as PIL images and as a tensor; smooth, since 8-bit rounding is what the two may differ by."""
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    pixels = (smooth * 255).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels], pixels.float() / 255


@pytest.mark.parametrize(
    ("size", "tolerance"), [((32, 32), 1e-5), ((64, 64), 1e-3), ((48, 80), 1e-3), ((80, 41), 1e-3), ((24, 20), 1e-3)]
)
def test_clip_equals_transformers(clip_folder, size, tolerance):
    images, media = eight_bit(3, *size)
    prompts = ["a red circle", "x", "word " * 40]
    expected, scale = reference(clip_folder, images, prompts)
    assert expected.std() > 0.02
    reward = ClipReward(model=str(clip_folder), chunk=2).build()
    torch.testing.assert_close(reward(media, prompts).values.detach(), expected, atol=tolerance, rtol=0)
    for variant, factor in (("percent", 100), ("logit", scale)):
        reward = ClipReward(model=str(clip_folder), variant=variant).build()
        scores = reward(media, prompts).values.detach()
        torch.testing.assert_close(scores, factor * expected, atol=factor * tolerance, rtol=0)
        assert reward.range == (-factor, factor)


def test_clip_gradient_reaches_every_pixel_that_counts(clip_folder):
    reward = ClipReward(model=str(clip_folder), chunk=2).build()
    media = eight_bit(3, 40, 40)[1].requires_grad_()
    reward(media, PROMPTS).values.sum().backward()
    assert (media.grad != 0).float().mean() > 0.99
    step = media.detach() + 0.02 * media.grad / media.grad.abs().max()
    assert (reward(step.clamp(0, 1), PROMPTS).values > reward(media, PROMPTS).values).all()


def test_clip_of_a_video_is_the_mean_of_its_frames(clip_folder):
    reward = ClipReward(model=str(clip_folder), chunk=2).build()
    frames = eight_bit(6, 32, 32)[1]
    video = reward(frames.unflatten(0, (3, 2)), ["a", "b", "c"]).values
    single = reward(frames, ["a", "a", "b", "b", "c", "c"]).values
    torch.testing.assert_close(video, single.unflatten(0, (3, 2)).mean(1))


def test_clip_scores_do_not_depend_on_the_batch(clip_folder):
    media = eight_bit(3, 32, 32)[1]
    one, many = (ClipReward(model=str(clip_folder), chunk=batch).build()(media, PROMPTS).values for batch in (1, 8))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)


def test_clip_in_bfloat16(clip_folder):
    media = eight_bit(3, 32, 32)[1]
    full, half = (
        ClipReward(model=str(clip_folder), dtype=name).build()(media, PROMPTS) for name in ("float32", "bfloat16")
    )
    assert 0 < (full.values - half.values).abs().max() < 0.02
    assert half.values.dtype == torch.float32


@pytest.mark.timeout(60)  # no retries of a hub that is away
def test_clip_that_is_none(clip_folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    with pytest.raises(RewardError, match=r"no folder /no/where"):
        ClipReward(model="/no/where").build()
    with pytest.raises(RewardError, match=r"owner/name does not load as AutoConfig.*HF_HUB_OFFLINE is set"):
        ClipReward(model="owner/name").build()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(
        RewardError, match=r"owner/name does not load as AutoConfig: .* reached: http://127.0.0.1:9: \w*Connect"
    ):
        ClipReward(model="owner/name").build()
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"not a whole CLIPModel: 1 weight is missing \(visual_projection\.weight\)"):
        ClipReward(model=str(tmp_path)).build()
    (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(RewardError, match=r"does not load as CLIPModel: SafetensorError"):
        ClipReward(model=str(tmp_path)).build()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RewardError, match="holds a bert model"):
        ClipReward(model=str(tmp_path)).build()
