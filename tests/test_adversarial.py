"""A reward that learns beside the policy: its discriminator, its place in a run, and where it may not be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_run import settings

import rewards
from align.config.load import load_config
from align.evaluation.evaluate import evaluate_run
from align.training.trainer import train
from alignflow.errors import CheckpointError, TrainingError
from rewards.base import RewardError
from rewards.images import RENDERS, read_folder
from rewards.networks.vision_features import VisionFeatures
from rewards.training.discriminator import PATCHES, Discriminator

LIKENESS: dict[str, Any] = {"kind": "adversarial", "model": "shapes", "hidden": 32, "lr": 1e-2}


@pytest.fixture(scope="module")
def features() -> VisionFeatures:
    """The embedded CLIP's."""
    return VisionFeatures.load("shapes", "float32", "cpu")


def plain(red: float, blue: float, count: int = 4) -> torch.Tensor:
    """Plain images, a little noisy."""
    noise = 0.05 * torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(int(100 * red)))
    return (noise + torch.tensor([red, 0.2, blue])[:, None, None]).clamp(0, 1)


def test_a_discriminator_learns_what_references_look_like_and_goes_on_to_the_same_bits(features):
    real, fake = plain(0.9, 0.1), plain(0.1, 0.9)
    judge = Discriminator(features.tokens, real, hidden=32, lr=3e-3)
    before = judge.reward().fingerprint()
    for _ in range(15):
        judge.fit(fake)
    kept = copy.deepcopy(judge.state_dict())
    for _ in range(15):
        judge.fit(fake)
    values = judge.reward()(torch.cat([plain(0.8, 0.1, 2), plain(0.2, 0.9, 2)]), ["a"] * 4).values
    assert values[:2].min().item() > values[2:].max().item()
    assert judge.reward().fingerprint() != before
    other = Discriminator(features.tokens, real, hidden=32, lr=3e-3)
    other.load_state_dict(kept)
    for _ in range(15):
        other.fit(fake)
    for name, value in judge.head.state_dict().items():
        assert torch.equal(other.head.state_dict()[name], value)


def test_a_discriminator_may_wait_until_it_is_behind(features):
    judge = Discriminator(features.tokens, plain(0.9, 0.1), hidden=32, lr=3e-3, only_behind=True)
    swapped = Discriminator(features.tokens, plain(0.1, 0.9), hidden=32, lr=3e-3, only_behind=True)
    moved = []
    for one, fake in ((judge, plain(0.1, 0.9)), (swapped, plain(0.9, 0.1))):
        before = copy.deepcopy(one.head.state_dict())
        found = one.fit(fake)
        same = all(torch.equal(before[name], value) for name, value in one.head.state_dict().items())
        assert same == (found["real"] > found["fake"])
        moved.append(not same)
    assert sorted(moved) == [False, True]  # of two that differ in the roles alone, one is behind


def test_a_score_and_a_step_are_of_the_whole_and_of_patches():
    """Beside the formulas, on rows that need no model: 0.7 whole + 0.3 patches, hinge of both with weight 0.3."""

    def rows(media):
        return torch.nn.functional.normalize(media.flatten(2).transpose(1, 2), dim=-1)  # a pixel is a token

    real, fake = plain(0.9, 0.1)[..., :2, :2], plain(0.1, 0.9)[..., :2, :2]
    judge = Discriminator(rows, real[:1], hidden=8, patches=0.3)
    whole, parts = judge.head(rows(fake)[:, 0])[:, 0], judge.head(rows(fake)[:, 1:])[..., 0]
    assert torch.allclose(judge.score(fake), 0.7 * whole + 0.3 * parts.mean(1), atol=1e-6)
    alone = Discriminator(rows, real[:1], hidden=8, patches=0.0)
    assert torch.allclose(alone.score(fake), whole, atol=1e-6)
    rng = np.random.default_rng([0, 0])  # of the seed and the call
    rng.integers(0, 1, 4)  # which references
    drawn = torch.from_numpy(1 + rng.integers(0, 3, (4, PATCHES)))
    with torch.no_grad():
        good, bad = judge.head(judge.real)[..., 0], judge.head(rows(fake))[..., 0]
        loss = (torch.relu(1 - good[:, :1]) + torch.relu(1 + bad[:, :1])).mean() / 2
        chosen = bad[torch.arange(4)[:, None], drawn]
        loss += 0.3 * (torch.relu(1 - good[:, 1:]) + torch.relu(1 + chosen)).mean() / 2
    found = judge.fit(fake)
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert found["real"] == pytest.approx(good[:, 0].mean().item(), abs=1e-6)


@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_of_dinov2_are_its_class_token_and_its_patches(registers, tmp_path):
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, **more
    )
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(tmp_path)
    transformers.BitImageProcessorPil(
        size={"height": 8, "width": 8}, do_center_crop=False, image_mean=[0.0] * 3, image_std=[1.0] * 3
    ).save_pretrained(tmp_path)
    vision, media = VisionFeatures.load(str(tmp_path), "float32", "cpu"), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        hidden = model(pixel_values=vision.preprocess(media)).last_hidden_state
        tokens = vision.tokens(media)
    assert tokens.shape == (2, 1 + 4, 16)
    wanted = torch.nn.functional.normalize(torch.cat([hidden[:, :1], hidden[:, -4:]], 1), dim=-1)
    assert torch.allclose(tokens, wanted, atol=1e-5)
    assert torch.equal(vision(media), tokens[:, 0])


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A folder of two red images of different sizes, and a file that is none."""
    folder = tmp_path / "red"
    folder.mkdir()
    Image.new("RGB", (40, 32), "red").save(folder / "b.png")
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(folder / "a.webp", lossless=True)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_references_are_read_by_name_at_their_own_sizes(red: Path) -> None:
    first, second = read_folder(str(red))
    assert first.shape == (3, 16, 16)
    assert bool((first == 1).all())  # transparent parts are white
    assert second.shape == (3, 32, 40)
    assert second[:, 0, 0].tolist() == [1, 0, 0]
    assert len(read_folder("shapes")) == RENDERS


def test_references_that_cannot_be_read_are_named(red: Path) -> None:
    (red / "c.png").write_bytes(b"no image")
    for folder, said in (
        (red, r"c\.png cannot be read"),
        (red / "none", "no folder"),
        (red.parent, "holds no image"),
    ):
        with pytest.raises(RewardError, match=said):
            rewards.parse({**LIKENESS, "references": str(folder)}).build()


@pytest.mark.slow
def test_it_leads_a_policy_to_its_references(tmp_path: Path) -> None:
    """Held-out samples become brighter although nothing but white images says so."""
    white = tmp_path / "white"
    white.mkdir()
    for name, light in (("a", 255), ("b", 235)):
        Image.new("RGB", (64, 64), (light, light, light)).save(white / f"{name}.png")
    reward = f"{{kind: adversarial, model: shapes, hidden: 32, lr: 1.0e-2, references: {white}}}"
    config = load_config(
        Path(__file__).parent.parent / "configs" / "shapes" / "nft.yaml",
        [f"reward={reward}", f"out={tmp_path / 'run'}", "rollout.prompts=4", "train.steps=8", "train.lr=3e-3",
         "train.schedule=constant", "train.ema=0", "evaluate.role=policy", "evaluate.every=0", "evaluate.prompts=48",
         "evaluate.rewards={light: {kind: tiny_run:brightness}}", "evaluate.gold=light", "samples.count=0",
         "checkpoint.every=0"],
    )  # fmt: skip
    summary = train(config)
    assert summary["gold_after"] > summary["gold_before"] + 0.05
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["refresh/real"] > row["refresh/fake"] for row in rows[2:] if row["event"] == "train")


def test_a_run_is_evaluated_with_what_its_reward_had_learned(model: Path, tmp_path: Path) -> None:
    both = {"kind": "mixture", "parts": {"likeness": {"reward": {**LIKENESS, "references": "shapes"}}}}
    config = settings(tmp_path, model, reward=both, train={"steps": 2}, evaluate={"every": 1})
    summary = train(config)
    assert evaluate_run(config, config.run_dir)["scores"]["reward"] == pytest.approx(summary["reward_after"], abs=1e-5)
    with pytest.raises(RewardError, match="trains alongside a policy"):
        evaluate_run(config)


@pytest.mark.parametrize("around", ["cached", "evaluate", "next"])
def test_it_is_refused_where_its_scores_mean_nothing(around: str, model: Path, tmp_path: Path) -> None:
    likeness = {**LIKENESS, "references": "shapes"}
    if around == "cached":
        with pytest.raises(RewardError, match="trains alongside a policy"):
            rewards.parse({"kind": "cached", "reward": likeness, "folder": str(tmp_path)}).build()
    elif around == "evaluate":
        with pytest.raises(RewardError, match="trains alongside a policy"):
            train(settings(tmp_path, model, evaluate={"rewards": {"likeness": likeness}}))
    else:
        with pytest.raises(TrainingError, match="use 'chunks'"):
            train(settings(tmp_path, model, reward=likeness, rollout={"overlap": "next"}))


def test_a_checkpoint_without_it_is_refused(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, train={"steps": 1})
    train(config)
    learning = rewards.parse({**LIKENESS, "references": "shapes"})
    with pytest.raises(CheckpointError, match="no reward that learns"):
        evaluate_run(config.model_copy(update={"reward": learning}), config.run_dir)
