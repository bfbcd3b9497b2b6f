"""Rewards of videos: few frames of many, motion and its acceleration, what stays the same, actions."""

from __future__ import annotations

import math

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
)

import rewards
from rewards.base import RewardError
from rewards.networks.optical_flow import optical_flow
from rewards.video.kinetic_residual import jerk
from rewards.video.motion_degree import fastest

GENERATOR = torch.Generator().manual_seed(0)
WAVES, SHIFTS = torch.randn(24, 2, generator=GENERATOR) * 0.22, torch.rand(24, generator=GENERATOR) * math.tau


def seen_from(dx, dy, height=64, width=64):
    """A texture without repetition, moved to the right by dx and down by dy: ``[1, 3, H, W]``."""
    y, x = torch.meshgrid(torch.arange(height) - dy, torch.arange(width) - dx, indexing="ij")
    waves = torch.sin(WAVES[:, 0, None, None] * x + WAVES[:, 1, None, None] * y + SHIFTS[:, None, None])
    return (0.5 + waves.mean(0)).clamp(0, 1).expand(1, 3, height, width)


def shown(positions):
    """A video in which the texture is at these places: ``[1, F, 3, H, W]``."""
    return torch.stack([seen_from(x, 0.0)[0] for x in positions])[None]


def build(kind, **options):
    return rewards.parse({"kind": kind, **options}).build()


CODE = """
import torch
def bright(media, prompts, image=None):
    return media.mean((1, 2, 3))
def even(media, prompts):
    return torch.ones(len(media))
def relative(media, prompts, group):
    return torch.ones(len(media))
def flow(a, b):
    return (b - a)[:, :2] * 10
def wrong(a, b):
    return a
def read(videos):
    return videos[:, :, 0, 0, 0].round()
class Logits:
    def __init__(self, actions):
        self.actions = actions
    def __call__(self, videos):
        return torch.eye(self.actions)[(videos[:, :, 0, 0, 0] * 3).long()]
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return str(tmp_path / "mine.py")


def test_segments_are_weighted_as_published(code):
    # 16 frames, 4 segments, lambda 1, every frame scored 1, first frames: the mean weight is 0.2592417
    video = torch.rand(2, 16, 3, 4, 4)
    constant = {"kind": f"{code}:even", "range": [0, 1]}
    value = build("segmental", reward=constant, pick="first")(video, ["a", "b"]).values
    assert value.tolist() == pytest.approx([0.2592417] * 2, abs=1e-7)
    for options in [{"normalise": True}, {"attenuation": 0}]:
        assert build("segmental", reward=constant, **options)(video, ["a", "b"]).values.tolist() == pytest.approx(
            [1, 1]
        )


def test_segments_score_their_own_frames(code):
    media = torch.linspace(0, 1, 8).view(1, 8, 1, 1, 1).expand(1, 8, 3, 4, 4).clone().requires_grad_()
    settings = {"kind": f"{code}:bright", "differentiable": True, "range": [0.25, 1]}
    reward = build("segmental", reward=settings, segments=2, attenuation=0.5, pick="middle")
    assert reward.range == (0, 1)
    value = reward(media, ["a"], None, {"image": torch.zeros(1, 3, 4, 4)}).values
    # frames 2 and 6, weights e^-1 and e^-1
    assert value.item() == pytest.approx(math.exp(-1) * (2 / 7 + 6 / 7) / 2)
    value.backward()
    assert media.grad.abs().sum((0, 2, 3, 4)).gt(0).tolist() == [i in (2, 6) for i in range(8)]
    torch.manual_seed(0)
    picks = {
        build("segmental", reward=settings, segments=1, pick="random", normalise=True)(
            media.detach(), ["a"], None, {"image": torch.zeros(1, 3, 4, 4)}
        ).values.item()
        for _ in range(12)
    }
    assert len(picks) > 2
    broken = media.detach().clone()
    broken[0, 6] = math.nan
    lost = reward(broken, ["a"], None, {"image": torch.zeros(1, 3, 4, 4)})
    assert lost.values.isnan().all()
    assert lost.reasons == {0: "the media hold NaN or infinity"}
    with pytest.raises(RewardError, match="compares samples"):
        build("segmental", reward={"kind": f"{code}:relative"})


@pytest.mark.parametrize(("dx", "dy"), [(1.0, 0.0), (-0.5, 0.25), (3.0, 2.0), (0.0, -6.0)])
def test_flow_of_a_moved_texture(dx, dy):
    flow = optical_flow(seen_from(0.0, 0.0), seen_from(dx, dy))
    error = (flow - torch.tensor([dx, dy]).view(2, 1, 1)).norm(dim=1)
    assert flow.shape == (1, 2, 64, 64)
    assert error.median() < 0.12
    assert error[:, 12:-12, 12:-12].mean() < 0.2


def test_flow_of_nothing_is_nothing():
    still = seen_from(0.0, 0.0)
    assert optical_flow(still, still).abs().max() == 0
    plain = torch.full((1, 3, 40, 48), 0.3)
    assert optical_flow(plain, plain + 0.1).abs().max() < 1e-3  # brighter, not moved


def test_jerk_is_zero_for_constant_acceleration():
    steps = torch.arange(6, dtype=torch.float64)
    field = torch.zeros(3, 6, 2, 2, 2, dtype=torch.float64)
    field[0, :, 0] = (1 + 0.3 * steps)[:, None, None]
    field[1, :, 1] = (0.1 * steps**3)[:, None, None][..., :1]
    place = torch.arange(7, dtype=torch.float64) ** 3 * 0.1  # a jerk of 0.6: each residual is 0.36
    field[2, :, 0] = place.diff()[:, None, None]
    found = jerk(field)
    assert found[0] < 1e-14
    assert found[2].item() == pytest.approx(0.36)
    assert jerk(field.flip(1))[2].item() == pytest.approx(0.36)
    assert torch.allclose(jerk(field + 5), found)


def test_thrown_things_beat_shaken_ones():
    reward = build("kinetic_residual")
    thrown = shown([0.0, 0.5, 1.5, 3.0, 5.0])
    shaken = shown([0.0, 2.0, 1.0, 3.5, 2.0])
    values = reward(torch.cat([thrown, shaken, shown([0.0] * 5)]), ["a"] * 3).values
    assert values[2] == 0
    assert -0.2 < values[0] < 0
    assert values[1] < -10
    leaf = shaken.clone().requires_grad_()
    before = reward(leaf, ["a"]).values
    before.sum().backward()
    after = reward((leaf + 0.01 * leaf.grad / leaf.grad.abs().max()).detach(), ["a"]).values
    assert after > before
    with pytest.raises(RewardError, match="videos of 4 frames or more, and was given videos of 3"):
        reward(thrown[:, :3], ["a"])


def test_motion_is_the_fastest_twentieth(code):
    field = torch.zeros(1, 2, 2, 20, 40)
    field[0, 0, 0, :1, :] = 3
    field[0, 0, 1, :1, :] = 4  # 40 of 800 pixels move by 5, in one of two steps
    assert fastest(field).item() == pytest.approx(5 / 2 * 256 / 20, rel=1e-5)
    videos = torch.cat([shown([0.0, 1.0, 2.0]), shown([0.0, 2.0, 4.0]), shown([0.0] * 3)])
    slow, fast, still = build("motion_degree")(videos, ["a"] * 3).values.tolist()
    assert still == 0
    assert slow == pytest.approx(256 / 64, rel=0.25)
    assert fast == pytest.approx(2 * 256 / 64, rel=0.25)
    assert build("motion_degree", enough=6)(videos, ["a"] * 3).values.tolist() == pytest.approx([slow / 6, 1, 0])
    media = torch.rand(1, 2, 3, 16, 16)
    own = build("motion_degree", flow=f"{code}:flow")(media, ["a"]).values
    expected = (10 * media.diff(dim=1)[0, 0, :2].norm(dim=0)).flatten().topk(12).values.mean() * 256 / 16
    assert own.item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(RewardError, match="should be 2 maps"):
        build("motion_degree", flow=f"{code}:wrong")(media, ["a"])
    with pytest.raises(RewardError, match="was given images"):
        build("motion_degree")(media[:, 0], ["a"])


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    square = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=square).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """As DINO's: squashed to a square, no pooler in the file."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model", ["shapes", "dino", "vit"])
def test_features_tell_what_is_alike(model, dino, vit):
    path = {"dino": dino, "vit": vit}.get(model, model)
    media = torch.rand(3, 3, 40, 32, generator=torch.Generator().manual_seed(1))
    image = media.flip(0)
    reward = build("feature_similarity", model=path, chunk=2)
    values = reward(media, list("abc"), None, {"image": image}).values
    assert values[1].item() == pytest.approx(1, abs=1e-5)
    assert values[0].item() == pytest.approx(values[2].item(), abs=1e-5)  # a cosine is symmetric
    assert values[0] < 0.999
    video = torch.stack([media[0], media[1], media[0]])[None]
    near = reward(media[:1], ["a"], None, {"image": media[1:2]}).values.item()
    # the second frame is compared with the first twice, the third with the second and with the first, its equal
    same = build("identity_consistency", model=path)(video, ["a"]).values.item()
    assert same == pytest.approx((max(near, 0) + (max(near, 0) + 1) / 2) / 2, abs=1e-5)
    still = build("identity_consistency", model=path)(media[:1, None].expand(1, 4, -1, -1, -1), ["a"]).values
    assert still.item() == pytest.approx(1, abs=1e-5)
    leaf = media.clone().requires_grad_()
    reward(leaf, list("abc"), None, {"image": image}).values.sum().backward()
    assert leaf.grad[0].abs().max() > 0


@pytest.fixture
def vjepa(tmp_path):
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "crop_size": 16, "frames_per_clip": 4, "mlp_ratio": 1.0, "pred_num_mask_tokens": 1}
    widths = dict.fromkeys(["hidden_size", "pred_hidden_size"], 32)
    heads = dict.fromkeys(["num_attention_heads", "pred_num_attention_heads"], 2)
    layers = dict.fromkeys(["num_hidden_layers", "pred_num_hidden_layers"], 1)
    VJEPA2Model(VJEPA2Config(**sizes, **widths, **heads, **layers)).save_pretrained(tmp_path / "vjepa")
    return str(tmp_path / "vjepa")


def test_mass_is_what_a_reference_video_shows(vjepa, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    (tmp_path / "clips").mkdir()
    (tmp_path / "secret.gif").write_bytes(b"")
    imageio.imwrite(tmp_path / "clips" / "a.gif", pixels)
    kept = torch.from_numpy(imageio.imread(tmp_path / "clips" / "a.gif")).permute(0, 3, 1, 2) / 255
    reward = build("mass_conservation", references=str(tmp_path / "clips"), model=vjepa, chunk=2)
    media = torch.stack([kept, kept.flip(-1), kept, kept])
    rows = [{"reference": "a.gif"}, {"reference": "a.gif"}, {"reference": "../secret.gif"}, {}]
    scores = reward(media, list("abcd"), None, {"metadata": rows})
    assert scores.values[0].item() == pytest.approx(0, abs=1e-8)
    assert scores.values[1] < -1e-6
    assert scores.reasons.keys() == {2, 3}
    assert "no reference video" in scores.reasons[2]
    long = reward(torch.rand(1, 6, 3, 32, 32), ["a"], None, {"metadata": rows[:1]})
    assert long.reasons == {0: "the reference video 'a.gif' has 4 frames, the sample 6"}
    leaf = media[1:2].clone().requires_grad_()
    value = reward(leaf, ["a"], None, {"metadata": rows[:1]}).values
    value.sum().backward()
    better = (leaf + 0.02 * leaf.grad / leaf.grad.abs().max()).detach()
    assert reward(better, ["a"], None, {"metadata": rows[:1]}).values > value
    with pytest.raises(RewardError, match="no folder"):
        build("mass_conservation", references=str(tmp_path / "none"), model=vjepa)


def test_actions_read_are_actions_asked_for(code):
    media = torch.tensor([1.0, 0, 1, 1]).view(1, 4, 1, 1, 1).expand(3, 4, 3, 2, 2)
    rows = [{"actions": [1, 0, 1, 0]}, {"actions": "[1, 0, 1, 1]"}, {"actions": [1]}]
    scores = build("inverse_dynamics", model=f"{code}:read", chunk=2)(media, list("abc"), None, {"metadata": rows})
    assert scores.values[:2].tolist() == [0.75, 1.0]
    assert scores.reasons == {2: "the model reads 4 actions, the prompt asks for 1"}
    near = build("inverse_dynamics", model=f"{code}:read", scale=0.5)
    value = near(media[:1], ["a"], None, {"metadata": rows[:1]}).values.item()
    assert value == pytest.approx((3 + math.exp(-2)) / 4)
    logits = build("inverse_dynamics", model=f"{code}:Logits", options={"actions": 4})
    assert logits(media[:1] / 1.5, ["a"], None, {"metadata": [{"actions": [2, 0, 2, 1]}]}).values.item() == 0.75
    for row, said in [
        ({}, "no 'actions'"),
        ({"actions": []}, "list of numbers"),
        ({"actions": ["left"]}, "list of numbers"),
    ]:
        assert said in near(media[:1], ["a"], None, {"metadata": [row]}).reasons[0]
    with pytest.raises(RewardError, match="cannot be made"):
        build("inverse_dynamics", model=f"{code}:Logits")
