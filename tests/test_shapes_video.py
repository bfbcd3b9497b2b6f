"""The embedded world in motion: captions, physics, the verifier of videos, and the models that draw them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import rewards
from align.data.prompts import read_prompts
from align.worlds import train_wan
from align.worlds.train_vae import IMAGES, VIDEOS, decode, encode, new_video_vae, unclamped
from alignflow.errors import DataError
from alignflow.worlds.shapes import motion, weights
from alignflow.worlds.shapes.motion import Motion
from alignflow.worlds.shapes.parse import parse_image
from rewards.worlds.shapes_video import PARTS, follow, motion_of, score_batch


def chw(videos: np.ndarray) -> np.ndarray:
    """uint8 [n, F, h, w, 3] -> float [n, F, 3, h, w] in [0, 1]."""
    return videos.transpose(0, 1, 4, 2, 3) / np.float32(255)


@pytest.fixture(scope="module")
def rendered() -> tuple[np.ndarray, list[str]]:
    videos, captions = motion.dataset("heldout", 120, seed=1)
    return chw(videos), captions


# -- captions and splits ----------------------------------------------------------------------------------------------


def test_captions_are_read_back():
    for split in ("train", "heldout"):
        specs = motion.sample_specs(split, 300, seed=0)
        assert [motion.parse_caption(motion.caption(spec)) for spec in specs] == specs
        assert [motion.is_held_out(spec) for spec in specs] == [split == "heldout"] * 300
        assert Counter(spec.task for spec in specs) == dict.fromkeys(motion.TASKS, 50)
    assert motion.parse_caption("A video of two grey-free red circles, moving".replace("grey-free ", "").replace(
        ", moving", " move left quickly on a grey background")).background == "gray"  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["a red circle", "a red circle move left", "two circles moves left", "a circle falls left",
     "a circle bounces slowly", "a circle is thrown to the up",
     "two circles is thrown to the left", "four circles fall", "a small circle falls"],
)  # fmt: skip
def test_captions_outside_the_grammar_are_refused(text):
    with pytest.raises(ValueError, match=r"is outside the grammar|does not go with"):
        motion.parse_caption(text)


def test_prompts_of_the_world():
    prompts = [p.text for p in read_prompts("shapes-video:heldout", 12, 3)]
    assert prompts == motion.prompts("heldout", 12, 3)
    with pytest.raises(DataError, match="shapes-video"):
        read_prompts("shapes-video:test", 1)


# -- physics ----------------------------------------------------------------------------------------------------------


def test_free_flight_accelerates_by_gravity_alone():
    t = motion.times(21)
    for path in (motion.fly(0, 0, t), motion.fly(30, 45, t)):
        acceleration = np.diff(path, 2, axis=0) * 20**2
        np.testing.assert_allclose(acceleration, np.broadcast_to([0, motion.GRAVITY], acceleration.shape), atol=1e-9)


def test_a_bounce_turns_at_the_ground_with_less_speed():
    t = np.linspace(0, 1, 2001)
    drop = 18.0
    y = motion.bounce(drop, t)[:, 1]
    speed = np.diff(y) * 2000
    assert y.max() == pytest.approx(drop, abs=0.05)
    assert speed.min() / speed.max() == pytest.approx(-motion.REBOUND, abs=0.01)


def test_videos_stay_on_the_canvas_and_apart():
    rng = np.random.default_rng(0)
    for spec in motion.sample_specs("train", 300, seed=5):
        frames = motion.sample_video(spec, rng).frames()
        assert len(frames) == motion.FRAMES
        boxes = np.array([[o.box for o in scene.objects] for scene in frames])
        assert boxes.shape[1] == spec.want.count
        assert boxes.min() >= 1.9
        assert boxes.max() <= 62.1
        centres = (boxes[..., :2] + boxes[..., 2:]) / 2
        for i in range(spec.want.count):
            for j in range(i):
                assert np.abs(centres[:, i] - centres[:, j]).max(-1).min() >= motion.WIDTH + 2


def test_no_motion_passes_for_another():
    every = [m for m in motion.motions() if m.speed or m.kind != "move"]
    for one in every:
        for path in motion.paths(one, 3, motion.times()):
            assert [other for other in every if motion_of(path, other) == 1] == [one]


# -- verifier ---------------------------------------------------------------------------------------------------------


def test_rendered_videos_are_right(rendered):
    videos, captions = rendered
    found = score_batch(videos, captions)
    assert found["reasons"] == {}
    for name in PARTS:
        assert found[name].mean() >= 0.99


def test_videos_of_other_prompts_are_wrong(rendered):
    videos, captions = rendered
    assert score_batch(videos, captions[7:] + captions[:7])["strict"].mean() <= 0.05
    rng = np.random.default_rng(0)
    wrong = [motion.caption(motion.corrupt(motion.parse_caption(c), rng)) for c in captions]
    found = score_batch(videos, wrong)
    assert found["strict"].mean() == 0
    assert found["dense"].max() < 1


def test_still_and_reversed_videos_do_not_move_as_asked(rendered):
    videos, captions = rendered
    still = score_batch(np.repeat(videos[:, 4:5], videos.shape[1], 1), captions)
    assert still["motion"].max() < 0.1
    assert still["identity"].mean() > 0.99
    assert still["persistence"].mean() > 0.99
    back = score_batch(videos[:, ::-1], captions)
    throws = np.array(["thrown" in c for c in captions])
    assert back["motion"][~throws].mean() < 0.3
    assert back["strict"].sum() == 0


def test_an_object_that_vanishes_or_changes_is_noticed():
    caption = "a red circle moves right quickly on a white background"
    rng = np.random.default_rng(0)
    video = motion.draw(motion.sample_video(motion.parse_caption(caption), rng))
    other = motion.draw(
        motion.sample_video(motion.parse_caption(caption.replace("red", "blue")), np.random.default_rng(0))
    )
    empty = np.full_like(video[:4], 250)
    gone, changed = np.concatenate([video[:5], empty]), np.concatenate([video[:5], other[5:]])
    found = score_batch(chw(np.stack([video, gone, changed])), [caption] * 3)
    assert found["strict"].tolist() == [1, 0, 0]
    assert found["persistence"][1] == pytest.approx(5 / 9)
    assert found["motion"].tolist() == [1, 1, 1]  # as far as it was seen
    assert found["identity"][2] == pytest.approx((5 + 4 * 2 / 3) / 9)
    open_colour = score_batch(chw(changed[None]), [caption.replace("red ", "")])
    assert open_colour["identity"][0] == found["identity"][2]


def test_objects_are_followed_where_the_parser_lists_them_in_another_order():
    video = motion.draw(motion.sample_video(motion.parse_caption("three green crosses fall"), np.random.default_rng(0)))
    scenes = [parse_image(frame) for frame in video]
    shuffled = [type(s)(s.objects[:: (-1) ** f], s.background) for f, s in enumerate(scenes)]
    tracks = follow(shuffled)
    assert len(tracks) == 3
    for track in tracks:
        assert motion_of(track.centres(), Motion("fall")) == 1


def test_verifier_as_a_reward(rendered):
    videos, captions = (torch.from_numpy(np.ascontiguousarray(rendered[0][:3])), rendered[1][:3])
    reward = rewards.parse("shapes_video").build()
    scores = reward(videos, [*captions[:2], "a red circle"])
    assert scores.values[:2].tolist() == [1, 1]
    assert set(scores.reasons) == {2}
    assert set(scores.parts) == set(PARTS)
    with pytest.raises(rewards.RewardError, match="reads videos"):
        reward(videos[:, 0], captions)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verifier_reads_videos_after_the_autoencoder():
    vae = AutoencoderKLWan.from_pretrained(weights("wan") / "vae").eval()
    videos, captions = motion.dataset("heldout", 120, seed=8)
    latents = encode(vae, videos)
    assert latents.shape == (120, *train_wan.LATENT_SHAPE)
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    read = score_batch(decode(vae, latents), captions)
    assert read["strict"].mean() >= 0.7
    assert read["dense"].mean() >= 0.9


@pytest.mark.slow
def test_base_follows_prompts_only_sometimes():
    pipe = WanPipeline.from_pretrained(weights("wan"))
    prompts = motion.prompts("heldout", 30, seed=10)
    found = score_batch(train_wan.sample(pipe, [p for p in prompts for _ in range(4)], seed=0), np.repeat(prompts, 4))
    dense = found["dense"].reshape(-1, 4)
    assert 0.5 < dense.mean() < 0.8
    assert dense.max(1).mean() > dense.mean() + 0.1


@pytest.mark.slow
def test_wan_loads_and_draws_without_our_packages(tmp_path):
    code = f"""
import sys, torch
torch.set_num_threads(1)
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained({str(weights("wan"))!r})
assert {{p.dtype for m in (pipe.transformer, pipe.vae, pipe.text_encoder) for p in m.parameters()}} == {{torch.float32}}
video = pipe("a red circle falls", height=32, width=32, num_frames=9, num_inference_steps=10, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
assert video.shape == (9, 32, 32, 3) and video.std() > 0.05, (video.shape, video.std())
assert not {{"generators", "rewards", "align"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})


def test_one_repeated_token_equals_many():
    torch.manual_seed(0)
    pipe = train_wan.new_pipeline(new_video_vae())
    model, text = train_wan.Model(pipe).eval(), "a red circle falls"
    ids = pipe.tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    x, t = torch.randn(1, *train_wan.LATENT_SHAPE), torch.tensor([0.3])
    with torch.no_grad():
        folded = model(x, t, ids, 512 - train_wan.TEXT_LENGTH + 1)
        pipe.transformer.set_attn_processor(WanAttnProcessor())
        embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
        many = pipe.transformer(x, t * 1000, embeds, return_dict=False)[0]
    torch.testing.assert_close(folded, many, atol=1e-5, rtol=1e-4)


def test_training_sees_what_the_decoder_gives_before_it_is_clamped():
    torch.manual_seed(0)
    vae = new_video_vae().eval()
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1.5
        raw = torch.randn(2, *train_wan.LATENT_SHAPE)
        out = unclamped(vae, raw)
        torch.testing.assert_close(out.clamp(-1, 1), vae.decode(raw).sample)
    assert out.abs().max() > 1


def test_training_sees_frames_then_windows_then_videos():
    x, rng = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(2, 3, 9, 4, 4), np.random.default_rng(0)
    assert VIDEOS.part(x, 0.0, rng).shape == (8, 3, 1, 4, 4)
    part = VIDEOS.part(x, 0.6, rng)
    assert part.shape == (2, 3, 5, 4, 4)
    assert part[0, 0, :, 0, 0].diff().tolist() == [1] * 4
    assert VIDEOS.part(x, 0.95, rng) is x
    assert IMAGES.part(x, 0.0, rng) is x
    assert VIDEOS.kl_weight(0.0) == VIDEOS.kl_weight(0.3) == 0
    assert 0 < VIDEOS.kl_weight(0.5) < VIDEOS.kl_weight(0.8) == VIDEOS.kl_weight(1.0) == VIDEOS.most_kl


def test_a_later_round_is_as_the_first_was_at_its_end():
    x, rng = torch.zeros(2, 3, 9, 4, 4), np.random.default_rng(0)
    for stages in (VIDEOS, IMAGES):
        later = stages.last()
        assert later.part(x, 0.0, rng) is x
        assert later.kl_weight(0.0) == stages.kl_weight(1.0) > 0
        assert later.loss(x + 0.1, x, 0.0) == stages.loss(x + 0.1, x, 0.99)


def test_every_word_is_one_token():
    tokenizer = train_wan.new_pipeline(new_video_vae()).tokenizer
    for spec in motion.sample_specs("train", 200, seed=3):
        text = "a video of " + motion.caption(spec)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 1 <= train_wan.TEXT_LENGTH
