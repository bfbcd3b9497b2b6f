"""Memory of the rewards' networks in the estimate, by the ids of published weights."""

from __future__ import annotations

import pytest

import rewards
from align.checking.reward_sizes import reward_bytes

PICK = {"kind": "pick_score", "dtype": "bfloat16"}
KNOWN = [
    (PICK, 2 * 986_109_441),
    ({"kind": "hpsv2"}, 4 * 986_109_441),
    ({"kind": "hpsv2", "version": "v2.0", "dtype": "float16"}, 2 * 986_109_441),
    ({"kind": "clip", "model": "openai/clip-vit-base-patch32"}, 4 * 151_277_313),
    ({"kind": "clip_score", "variant": "reno"}, 4 * 986_109_441),
    ({"kind": "aesthetic", "dtype": "bfloat16"}, 2 * 427_616_513 + 4 * 927_969),
    ({"kind": "image_reward"}, 4 * 447_000_000),
    ({"kind": "hpsv3", "template": "question.txt"}, 2 * 8_291_375_616),
    ({"kind": "yes_probability"}, 2 * 8_292_166_656),
    ({"kind": "yes_probability", "judge": {"url": "http://127.0.0.1:1/v1", "model": "judge"}}, 0),
    ({"kind": "remote", "url": "http://127.0.0.1:1"}, 0),
    ({"kind": "placed", "device": "cpu", "reward": PICK}, 0),
    ({"kind": "cached", "folder": "scores", "reward": PICK}, 2 * 986_109_441),
    ({"kind": "mixture", "parts": {"a": {"reward": PICK}, "b": {"reward": {"kind": "shapes"}}}}, 2 * 986_109_441),
]


@pytest.mark.parametrize(("settings", "expected"), KNOWN, ids=lambda value: str(value)[:60])
def test_published_weights_count(settings, expected):
    bytes_, how = reward_bytes([rewards.parse(settings)])
    assert bytes_ == expected
    assert "not known" not in how


@pytest.mark.parametrize("settings", [{**PICK, "model": "me/mine"}, {"kind": "pool", "reward": PICK}], ids=str)
def test_others_are_named_and_not_counted(settings):
    bytes_, how = reward_bytes([rewards.parse({"kind": "hpsv2"}), rewards.parse(settings)])
    assert bytes_ == 4 * 986_109_441
    assert how == f"hpsv2 986 million weights, float32; without {settings['kind']}, whose size is not known here"


def test_equal_settings_are_one_network():
    once = reward_bytes([rewards.parse(PICK)])
    assert reward_bytes([rewards.parse(PICK), rewards.parse(PICK), None]) == once
