"""Trust in a trained reward: distances in closed form, weights of the notes, and what a run without them says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_reward_training import config as reward_config
from tiny_run import settings
from torch import Tensor

from align.config.load import load_reward
from align.maths.weights import feature_trust
from align.preference.train import train_reward
from align.recipes.grpo import GRPO
from align.recipes.prefpaint import PrefPaint
from align.training.trainer import train
from alignflow.errors import TrainingError
from rewards.base import RewardError, Scores
from rewards.training import folder, heads, trust
from rewards.training.heads import build_head
from rewards.training.settings import parse_head

GROUP = torch.tensor([0, 0, 1, 1])


def test_weights_are_the_notes() -> None:
    found = feature_trust(torch.tensor([0.0, 10.0, 14.0, 20.0]), 0.05, 0.7)
    torch.testing.assert_close(found, torch.tensor([2.01375, 1.22140, 1.0, 1.0]), atol=1e-5, rtol=0)
    assert float(feature_trust(torch.tensor(0.0), 0.05, 2.0)) == pytest.approx(2.21)


def test_distances_are_closed_forms() -> None:
    """Ten training features along each axis of length 3: V is 1 + 90 there, and 1 elsewhere."""
    seen = 3 * torch.eye(3)[:2].repeat(10, 1)
    inverse = trust.inverse_of(trust.gram(seen), 1.0)
    away = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 3.0], [3.0, 0.0, 4.0]])
    expected = torch.tensor([9 / 91, 9.0, 9 / 91 + 16]).sqrt()
    torch.testing.assert_close(trust.distance(away, inverse), expected)
    expected = torch.tensor([3 / 91, 3.0, ((3 / 91) ** 2 + 16) ** 0.5])
    torch.testing.assert_close(trust.distance(away, inverse, "product"), expected)


def test_features_are_what_the_last_layer_reads() -> None:
    image, text = torch.nn.functional.normalize(torch.randn(2, 5, 6), dim=-1)
    for kind, hidden in (("mlp", 4), ("uncertain", 4), ("mlp", 0)):
        head = build_head(parse_head({"kind": kind, "hidden": hidden}), 6, 0)
        found = head.features(image, text)
        assert found.shape == (5, hidden or 18)
        last: Any = head.score[-1] if hidden else head.score
        assert torch.allclose(last(found)[:, 0], head(image, text)[:, 0], atol=1e-6)
    cosine = build_head(parse_head({"kind": "cosine"}), 6, 0)
    assert torch.equal(cosine.features(image, text), heads.joint(image, text))


def test_a_trained_reward_knows_what_it_has_seen(tmp_path: Path) -> None:
    config = reward_config(tmp_path, "fit.steps=2")
    train_reward(config)
    gram = folder.load_gram(str(config.run_dir))
    assert gram is not None
    assert torch.allclose(gram, gram.T)
    path = config.run_dir
    reward = load_reward(f"{{kind: trained, path: {path}}}").build()
    level = torch.tensor([128, 60, 127]) / 255
    media = torch.stack([level[:, None, None].expand(3, 8, 8), torch.rand(3, 8, 8)])
    near, far = reward(media, ["a circle", "two green stars"]).parts["distance"].tolist()
    assert 0 < near < far / 3
    wide = load_reward(f"{{kind: trained, path: {path}, ridge: 1.0e+6}}").build()
    assert wide(media, ["a circle", "a circle"]).parts["distance"][0] < near
    other = load_reward(f"{{kind: trained, path: {path}, norm: product}}").build()
    assert other(media, ["a circle", "a circle"]).parts["distance"][0] != pytest.approx(near)
    (path / "gram.safetensors").unlink()
    assert load_reward(f"{{kind: trained, path: {path}}}").build()(media, ["a", "b"]).parts == {}
    (path / "head.safetensors").rename(path / "gram.safetensors")
    with pytest.raises(RewardError, match=r"gram.safetensors should hold a square matrix named gram"):
        folder.load_gram(str(path))


def scores(values: list[float], distance: list[float]) -> Scores:
    return Scores(torch.tensor(values), parts={"distance": torch.tensor(distance)})


def test_the_advantage_is_weighed_by_trust() -> None:
    given = scores([1.0, 3.0, 0.0, 4.0], [0.0, 10.0, 20.0, float("nan")])
    plain = GRPO(normalise_by="group", advantage_clip=10).credit(given, GROUP)
    found = PrefPaint().credit(given, GROUP)
    torch.testing.assert_close(found / plain, torch.tensor([2.01375, 1.22140, 1.0, 1.0]), atol=1e-5, rtol=0)
    assert torch.equal(PrefPaint(rate=0.0, bias=0.0).credit(given, GROUP), plain)


def test_no_scores_at_all_teach_nothing() -> None:
    nothing = Scores(torch.full((4,), torch.nan))
    assert PrefPaint().credit(nothing, GROUP).tolist() == [0, 0, 0, 0]


def unaware(media: Tensor, prompts: list[str]) -> Tensor:
    return media.flatten(1).mean(1)


def test_a_reward_without_distance_is_named(model: Path, tmp_path: Path) -> None:
    clip = {"kind": "clip", "model": "shapes"}
    assert settings(tmp_path, model, "prefpaint", reward={"kind": "mixture", "parts": {"a": {"reward": clip}}})
    with pytest.raises(ValidationError, match="by the distance that kind 'trained' gives, and clip gives none"):
        settings(tmp_path, model, "prefpaint", reward=clip)
    recipe = {"kind": "prefpaint", "part": "other/distance"}
    config = settings(tmp_path, model, recipe, reward={"kind": "test_prefpaint:unaware"})
    with pytest.raises(TrainingError, match="no part 'other/distance', its parts: given, level, level/distance"):
        train(config)


def test_bounds_rise(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValidationError, match=r"(?s)recipe.bounds.*should be \[lowest, highest\] above 0, given \[2.0, 1.0\]"
    ):
        settings(tmp_path, model, {"kind": "prefpaint", "bounds": [2.0, 1.0]})
