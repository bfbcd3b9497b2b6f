"""Rewards on tiny random weights in the published layouts: the published formulas, gradients, videos, odd prompts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_rewards
import torch
from PIL import Image
from torch.nn import functional as F

import rewards
from rewards.encoders.goal_baseline import projected
from rewards.encoders.pick_score import among
from rewards.networks.clip import mended
from rewards.networks.preprocess import CLIP_MEAN, CLIP_STD

PROMPTS = ["a red circle", "", "Füße 東京 &amp; “its”", "word " * 10_000, "a red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weight files of every layout, and tokenizers."""
    out = tmp_path_factory.mktemp("rewards")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = tiny.clip_tokenizer()
        tokens.save_pretrained(out / "clip")
        tiny.clip_model(out / "pick")
        bert = tiny_rewards.bert_tokenizer(out / "bert")
        for name, quick_gelu in (("hps", False), ("openai", True)):
            network = tiny_rewards.wide(tiny_rewards.OpenClip(len(tokens), quick_gelu), 1)
            state = network.state_dict()
            torch.save({"state_dict": state, "epoch": 3} if name == "hps" else state, out / f"{name}.pt")
        network = tiny_rewards.wide(tiny_rewards.ImageRewardNet(len(bert) + 2), 2)
        torch.save(network.state_dict(), out / "ImageReward.pt")
        torch.save(torch.nn.Linear(32, 1).state_dict(), out / "v1.pth")
        torch.save(
            {f"layers.{key}": value for key, value in tiny_rewards.head(32).state_dict().items()}, out / "v2.pth"
        )
    return out


@pytest.fixture(scope="module")
def media():
    """Five images of the towers' own size, so that only the networks count."""
    noise = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(noise, (32, 32), mode="bilinear") * 255).round() / 255


def settings(folder):
    clip = {"processor": str(folder / "clip")}
    openai = {"model": str(folder / "openai.pt"), **clip}
    return {
        "hpsv2": {"kind": "hpsv2", "weights": str(folder / "hps.pt"), **clip},
        "hpsv2 percent": {"kind": "hpsv2", "version": "v2.0", "variant": "percent", "weights": str(folder / "hps.pt"),
                          **clip},
        "social_reward": {"kind": "social_reward", "weights": openai["model"], **clip},
        "hessel": {"kind": "clip_score", **openai},
        "image_reward clip": {"kind": "clip_score", "variant": "image_reward", **openai},
        "aesthetic v1": {"kind": "aesthetic", "version": "v1", "head": str(folder / "v1.pth"), **openai},
        "aesthetic v2": {"kind": "aesthetic", "head": str(folder / "v2.pth"), **openai},
        "goal_baseline": {"kind": "goal_baseline", "baseline": ["a photo", "an image"], "alpha": 0.7,
                          "quick_gelu": True, **openai},
        "image_reward": {"kind": "image_reward", "weights": str(folder / "ImageReward.pt"),
                         "tokenizer": str(folder / "bert")},
    }  # fmt: skip


KINDS = tuple(settings(Path()))


def built(folder, name, **options):
    return rewards.parse({**settings(folder)[name], **options}).build()


def pixels(media):
    return (media - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


@torch.no_grad()
def clip_rows(folder, file, media, prompts):
    """Unit rows of images and prompts by the reference network, prompts as open_clip pads them: with zeros."""
    tokens = tiny.clip_tokenizer()
    network = tiny_rewards.OpenClip(len(tokens), file == "openai")
    state = torch.load(folder / f"{file}.pt")
    network.load_state_dict(state.get("state_dict", state))
    read = tokens([mended(text) for text in prompts], padding="max_length", truncation=True, return_tensors="pt")
    rows = network.visual(pixels(media)), network.encode_text(read.input_ids * read.attention_mask)
    return [F.normalize(row, dim=-1) for row in rows]


@torch.no_grad()
def expected(folder, name, media, prompts):
    """The published formula on the reference network."""
    if name == "image_reward":
        tokens = tiny_rewards.bert_tokenizer(folder / "bert")
        network = tiny_rewards.ImageRewardNet(len(tokens) + 2).eval()
        network.load_state_dict(torch.load(folder / "ImageReward.pt"))
        read = tokens(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return network.score(pixels(media), read.input_ids, read.attention_mask)
    file = "hps" if name.startswith("hpsv2") else "openai"
    asked = [f"A photo depicts {prompt}" for prompt in prompts] if name == "hessel" else prompts
    seen, read = clip_rows(folder, file, media, asked)
    cosine = (seen * read).sum(-1)
    if name.startswith("aesthetic"):
        weights = torch.load(folder / f"{name[-2:]}.pth")
        head = torch.nn.Linear(32, 1) if name.endswith("v1") else tiny_rewards.head(32).eval()
        head.load_state_dict({key.removeprefix("layers."): value for key, value in weights.items()})
        return head(seen).squeeze(-1)
    if name == "goal_baseline":
        start = clip_rows(folder, file, media, ["a photo", "an image"])[1].mean(0)
        return torch.stack([by_matrix(x, goal, start, 0.7) for x, goal in zip(seen, read, strict=True)])
    return {"hpsv2 percent": 100 * cosine, "hessel": 2.5 * cosine.clamp(min=0)}.get(name, cosine)


def by_matrix(x, goal, baseline, alpha):
    """VLM-RMs' formula with its projection matrix."""
    line = (goal - baseline)[None]
    projection = alpha * line.T @ line / line.norm() ** 2 + (1 - alpha) * torch.eye(len(goal))
    return 1 - ((x - goal) @ projection).norm() ** 2 / 2


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_published_formula(folder, media, name):
    reward = built(folder, name, chunk=2)
    scores = reward(media, PROMPTS)
    truth = expected(folder, name, media, PROMPTS)
    assert truth.std() > (1e-3 if name == "aesthetic v2" else 0.02)  # v2's fresh layers have little to say
    torch.testing.assert_close(scores.values.detach(), truth, atol=2e-5 * max(1, truth.abs().max()), rtol=0)
    assert not scores.reasons
    assert reward.differentiable
    assert all(reward.range[0] <= value <= reward.range[1] for value in scores.values.tolist())


def test_hessel_counts_negative_cosines_as_zero(folder, media):
    many, texts = media.repeat(8, 1, 1, 1), ["abcdefgh"[i // 5] for i in range(40)]
    prefixed = built(folder, "image_reward clip")(many, [f"A photo depicts {text}" for text in texts]).values
    score = built(folder, "hessel")(many, texts).values
    assert (prefixed < 0).any()
    assert (prefixed > 0).any()
    torch.testing.assert_close(score, 2.5 * prefixed.clamp(min=0))


def test_pick_score_variants(folder, media):
    from transformers import AutoTokenizer, CLIPModel

    prompts = ["a red circle", "x", "x", "y", "x"]
    model, tokens = CLIPModel.from_pretrained(folder / "pick"), AutoTokenizer.from_pretrained(folder / "pick")
    with torch.no_grad():
        out = model(pixel_values=pixels(media), **tokens(prompts, padding=True, return_tensors="pt"))
    cosine, scale = (out.image_embeds * out.text_embeds).sum(-1), model.logit_scale.exp().item()
    logits = scale * cosine
    among_x = logits[[1, 2, 4]].softmax(0)
    wanted = {
        "logit": logits,
        "cosine": cosine,
        "flow_grpo": logits / 26,
        "probability": torch.stack([torch.tensor(1.0), among_x[0], among_x[1], torch.tensor(1.0), among_x[2]]),
    }
    for variant, truth in wanted.items():
        folders = {"model": str(folder / "pick"), "processor": str(folder / "pick")}
        found = rewards.parse({"kind": "pick_score", "variant": variant, **folders}).build()(media, prompts).values
        torch.testing.assert_close(found.detach(), truth, atol=1e-5, rtol=1e-5)


def test_probability_is_among_the_group():
    logits = torch.tensor([1.0, 2.0, 3.0, 900.0])
    odds = among(logits, ["a"] * 4, torch.tensor([5, 7, 7, 5]))
    share = 1 / (1 + math.e)
    torch.testing.assert_close(odds, torch.tensor([0.0, share, 1 - share, 1.0]))
    alone = among(torch.tensor([-4.0]), ["a"], None)
    assert alone.tolist() == [1.0]


def test_torchmetrics_and_reno(folder, media):
    folders = {"model": str(folder / "pick")}
    cosine = rewards.parse({"kind": "clip", **folders}).build()(media, PROMPTS).values
    scale = rewards.parse({"kind": "clip", "variant": "logit", **folders}).build().range[1]
    for variant, truth in (("torchmetrics", 100 * cosine.clamp(min=0)), ("reno", scale * cosine)):
        found = rewards.parse({"kind": "clip_score", "variant": variant, **folders}).build()(media, PROMPTS).values
        torch.testing.assert_close(found, truth)
    assert (cosine < 0).any()


def test_goal_baseline_ends():
    rows = [F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(i)), dim=-1) for i in range(2)]
    image, goal = rows
    baseline = F.normalize(torch.ones(8), dim=-1)
    torch.testing.assert_close(projected(image, goal, baseline, 0.0), (image * goal).sum(-1))
    torch.testing.assert_close(projected(goal, goal, baseline, 0.3), torch.ones(4))
    beside = F.normalize(torch.tensor([0.0, 0.0, 1.0]), dim=-1)  # off the line, where alpha = 1 does not look
    x, y = torch.eye(3)[0], torch.eye(3)[1]
    torch.testing.assert_close(
        projected(beside[None], x[None], y, 1.0), projected(0.5 * (x + y)[None], x[None], y, 1.0)
    )


def test_goal_that_is_the_baseline_has_no_score(folder, media):
    scores = built(folder, "goal_baseline", baseline="a photo")(media, ["a photo", *PROMPTS[1:]])
    assert scores.reasons == {0: "the goal equals the baseline, so no direction separates them"}
    assert scores.values[1:].isfinite().all()


def test_goal_of_its_own_ignores_the_prompts(folder, media):
    reward = built(folder, "goal_baseline", goal="a red circle")
    assert torch.equal(reward(media, PROMPTS).values, reward(media, ["z"] * 5).values)


# -- what holds for all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_gradient_reaches_the_pixels_and_the_batch_does_not_matter(folder, media, name):
    large = F.interpolate(media, (48, 40)).requires_grad_()
    one, many = (built(folder, name, chunk=batch)(large, PROMPTS).values for batch in (1, 8))
    torch.testing.assert_close(one, many, atol=1e-4 * max(1, many.abs().max().item()), rtol=0)
    (grad,) = torch.autograd.grad(many.sum(), large)
    seen = many.detach() != 0  # hessel counts negative cosines as 0
    assert seen.any()
    crop = slice(None) if name.startswith(("hpsv2", "goal")) else slice(5, -5)
    assert (grad[seen][..., crop, :] != 0).float().mean() > 0.95


@pytest.mark.parametrize("name", ["hpsv2", "image_reward", "hessel"])
def test_a_clip_is_the_mean_of_its_frames(folder, media, name):
    clip = torch.stack([media[:4], media[1:5]])
    single = built(folder, name)(clip.flatten(0, 1), ["a"] * 4 + ["b"] * 4).values.unflatten(0, (2, 4))
    torch.testing.assert_close(built(folder, name, chunk=3)(clip, ["a", "b"]).values, single.mean(1), atol=1e-5, rtol=0)
    two = built(folder, name, frames=2)(clip, ["a", "b"]).values
    torch.testing.assert_close(two, single[:, [1, 3]].mean(1), atol=1e-5, rtol=0)
    still = built(folder, name)(clip[:, :1], ["a", "b"]).values
    torch.testing.assert_close(still, single[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["hpsv2", "image_reward"])
def test_prompts_of_any_kind(folder, media, name):
    reward = built(folder, name)
    odd = ["", " \n\t", "\udcff half a pair", "🎈" * 50, "<|endoftext|> [SEP] [ENC]"]
    scores = reward(media, odd)
    assert not scores.reasons
    long = reward(media, ["ab " * 10_000] * 5).values
    torch.testing.assert_close(long, reward(media, ["ab " * 200] * 5).values)
    assert not torch.equal(long, scores.values)


def test_curly_quotes_and_entities_read_as_openai_reads_them():
    assert mended("“its” &amp;amp; cafÃ© ") == '"its" & café'


def test_nothing_to_score(folder):
    for name in ("hpsv2", "image_reward", "aesthetic v1"):
        assert built(folder, name)(torch.zeros(0, 3, 32, 32), []).values.shape == (0,)


def test_broken_pixels_cost_their_own_sample_only(folder, media):
    spoilt = media.clone()
    spoilt[1, 0, 3, 3] = torch.nan
    for name in ("hpsv2", "image_reward"):
        scores = built(folder, name)(spoilt, PROMPTS)
        assert scores.reasons == {1: "the media hold NaN or infinity"}
        assert scores.values[[0, 2, 3, 4]].isfinite().all()


def test_no_pixels(folder):
    for shape in ((2, 3, 0, 0), (2, 0, 3, 32, 32)):
        with pytest.raises(rewards.RewardError, match="have no pixels"):
            built(folder, "hpsv2")(torch.zeros(shape), ["a", "b"])


def test_files_of_every_kind_are_scored(folder, tmp_path):
    """Other sizes, grey, with transparency, a video of one frame: the score of the same pixels on white in RGB."""
    from align.data.prompts import Prompt
    from align.evaluation.files import score_files

    draw = np.random.default_rng(0)
    colours = Image.fromarray(draw.integers(0, 256, (40, 50, 4), dtype=np.uint8), "RGBA")
    grey = Image.fromarray(draw.integers(0, 256, (33, 21), dtype=np.uint8))
    white = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    pairs = {"alpha.png": (colours, white.convert("RGB")), "grey.png": (grey, grey.convert("RGB"))}
    for name, (image, same) in pairs.items():
        image.save(tmp_path / name)
        same.save(tmp_path / f"same-{name}")
    white.convert("RGB").save(tmp_path / "one.webp", save_all=True, lossless=True)
    names = [*pairs, *(f"same-{name}" for name in pairs), "one.webp"]
    asked = {name: rewards.parse(settings(folder)[name]) for name in ("hpsv2", "image_reward")}
    rows = score_files([tmp_path / name for name in names], [Prompt("a circle")], asked)
    assert all(not row["reasons"] for row in rows)
    for name in asked:
        alpha, grey_score, on_white, rgb, still = (row["scores"][name] for row in rows)
        assert alpha == on_white == still
        assert grey_score == rgb
        assert abs(alpha - grey_score) > 1e-3


def test_half_precision_is_near(folder, media):
    for name in ("hpsv2", "image_reward"):
        full, half = (built(folder, name, dtype=dtype)(media, PROMPTS).values for dtype in ("float32", "bfloat16"))
        assert half.dtype == torch.float32
        assert 0 < (full - half).abs().max() < 0.05 * full.abs().max()
