"""Actions of the embedded world in motion: what captions ask for, and inverse dynamics that read it back (RLIR)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from align.config.load import load_config
from align.policy.build import build_rewards
from alignflow.worlds.shapes import motion
from alignflow.worlds.shapes.world import render
from rewards.worlds.shapes_actions import action_of, actions

ROOT = Path(__file__).parent.parent


def video_of(caption: str, seed: int = 0) -> Tensor:
    """A true video ``[F, 3, 32, 32]`` of a caption."""
    made = motion.sample_video(motion.parse_caption(caption), np.random.default_rng(seed))
    frames = np.stack([render(scene, motion.SIZE) for scene in made.frames()])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def test_actions_of_a_caption_are_its_direction() -> None:
    assert motion.ACTIONS == ("stay", "left", "right", "up", "down")
    assert motion.actions(motion.parse_caption("a red circle moves right slowly").motion) == [2] * 8
    assert motion.actions(motion.Motion("fall"), 4) == [4] * 3
    with pytest.raises(ValueError, match="the steps of a throw are not determined"):
        motion.actions(motion.Motion("throw", "left"))


def test_true_videos_are_read_as_their_captions() -> None:
    captions = [f"a {colour} square moves {way}" for colour in ("red", "cyan") for way in motion.DIRECTIONS]
    captions += ["two green circles move up quickly", "a blue triangle falls", "a square moves left slowly"]
    found = actions(torch.stack([video_of(caption) for caption in captions]))
    wanted = torch.tensor([motion.actions(motion.parse_caption(caption).motion) for caption in captions])
    assert float((found == wanted).float().mean()) > 0.98


def test_what_does_not_move_or_is_not_there_stays() -> None:
    still = video_of("a red square moves up")[:1].expand(9, 3, 32, 32)
    empty = torch.full((9, 3, 32, 32), 0.5)
    assert actions(torch.stack([still, empty])).tolist() == [[0] * 8] * 2
    assert [action_of(np.array(shift)) for shift in ([2.0, 1.0], [-0.2, 0.1], [0.0, -1.0])] == [2, 0, 3]


def test_the_reward_of_the_config_is_the_share_of_the_actions() -> None:
    config = load_config(ROOT / "configs/shapes-video/rlir.yaml")
    reward = build_rewards({"reward": config.reward}, "cpu")["reward"]
    media = torch.stack([video_of("a red square moves left"), video_of("a red square moves right")])
    half = torch.cat([media[0, :5], media[0, 4:5].expand(4, 3, 32, 32)])[None]  # it stops half-way
    rows = [{"actions": [1] * 8}] * 3
    scores = reward(torch.cat([media, half]), ["a"] * 3, None, {"metadata": rows}).values
    assert scores.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("name", ["actions", "actions-heldout"])
def test_tables_ask_for_what_their_captions_say(name: str) -> None:
    rows = [json.loads(line) for line in (ROOT / f"configs/prompts/{name}.jsonl").read_text().splitlines()]
    specs = [motion.parse_caption(row["prompt"]) for row in rows]
    assert all(motion.actions(spec.motion) == row["actions"] for spec, row in zip(specs, rows, strict=True))
    assert {motion.is_held_out(spec) for spec in specs} == {name == "actions-heldout"}
