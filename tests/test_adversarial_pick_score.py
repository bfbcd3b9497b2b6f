"""A CLIP score that is tuned beside the policy until references are ahead of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import final_tensors, policy_gap, settings

import rewards
from align.training.trainer import train
from rewards.base import RewardError
from rewards.images import RENDERS, read_table
from rewards.networks.clip import Clip
from rewards.training.tuned_clip import TunedClip

TUNED: dict[str, Any] = {"kind": "adversarial_pick_score", "model": "shapes", "processor": "shapes", "lr": 1e-3}
LAST = ("vision_model.encoder.layers.2.", "vision_model.encoder.layers.3.")


def images(seed: int, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def tuned(references: dict[str, list[torch.Tensor]], **options: Any) -> TunedClip:
    clip = Clip.load("shapes", None, "float32", "cpu")
    return TunedClip(clip, references, **{"lr": 1e-3, **options})


@pytest.fixture(scope="module")
def good() -> list[torch.Tensor]:
    """A render of the caption."""
    return next(iter(read_table("shapes").values()))[:1]


@pytest.fixture(scope="module")
def caption() -> str:
    return next(iter(read_table("shapes")))


def same(before: dict[str, torch.Tensor], model: torch.nn.Module) -> list[str]:
    """Names of what did not change."""
    return [name for name, value in model.state_dict().items() if torch.equal(before[name], value)]


def test_only_the_last_layers_learn_and_the_loss_is_the_closed_form(good, caption):
    """Noise stands for references, renders for samples, which are ahead by far."""
    judge = tuned({caption: list(images(0, 3))}, seed=3, chunk=3)
    media, prompts = torch.stack(good * 4), [caption] * 4
    before = copy.deepcopy(judge.clip.model.state_dict())
    with torch.no_grad():
        scale, text = judge.clip.logit_scale, judge.clip.text_features([caption], 1)
        noise = scale * (judge.clip.image_features(images(0, 3)) @ text[0])
        sample = scale * (judge.clip.image_features(good[0][None]) @ text[0])
    rng = np.random.default_rng([3, 0])
    drawn = noise[[int(rng.integers(3)) for _ in range(4)]]
    found = judge.fit(media, prompts)
    assert found["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(drawn - sample).mean().item(), rel=1e-4)
    assert found["real"] == pytest.approx(drawn.mean().item(), abs=1e-3)
    assert found["fake"] == pytest.approx(sample.item(), abs=1e-3)
    assert found["pairs"] == 4
    assert judge.instead
    unchanged = same(before, judge.clip.model)
    assert [name for name in before if name not in unchanged] == [name for name in before if name.startswith(LAST)]
    assert not any(value.requires_grad for value in judge.clip.model.parameters())
    gap = found["real"] - found["fake"]
    for _ in range(3):
        found = judge.fit(media, prompts)
    assert found["real"] - found["fake"] > gap + 1


def test_it_waits_while_references_are_ahead(good, caption):
    judge = tuned({caption: good})
    before, name = copy.deepcopy(judge.clip.model.state_dict()), judge.reward("r").fingerprint()
    found = judge.fit(images(0), [caption] * 4)
    assert found["real"] > found["fake"]
    assert not judge.instead
    assert len(same(before, judge.clip.model)) == len(before)
    assert judge.reward("r").fingerprint() == name
    assert judge.fit(torch.stack(good), [caption])["loss"] == pytest.approx(0.6931, abs=1e-3)  # equals are no reason
    assert not judge.instead


def test_prompts_without_references_teach_nothing(good, caption):
    judge = tuned({caption: list(images(0, 1))}, chunk=1)
    before = copy.deepcopy(judge.clip.model.state_dict())
    found = judge.fit(torch.stack(good), ["a purple star nobody drew"])
    assert found["pairs"] == 0
    assert not judge.instead
    assert len(same(before, judge.clip.model)) == len(before)
    some = judge.fit(torch.stack([images(1, 1)[0], *good]), ["a purple star nobody drew", caption])
    assert some["pairs"] == 1
    assert judge.instead


def test_it_goes_on_to_the_same_bits_and_scores_with_gradient(good, caption):
    def made():
        return tuned({caption: list(images(0, 5))})

    media, prompts = torch.stack(good * 2), [caption] * 2
    whole, half = made(), made()
    for _ in range(4):
        whole.fit(media, prompts)
    for _ in range(2):
        half.fit(media, prompts)
    kept, other = copy.deepcopy(half.state_dict()), made()
    other.load_state_dict(kept)
    for _ in range(2):
        other.fit(media, prompts)
    assert len(same(whole.clip.model.state_dict(), other.clip.model)) == len(whole.clip.model.state_dict())
    leaf = media.clone().requires_grad_()
    reward = other.reward("adversarial_pick_score")
    reward(leaf, prompts).values.sum().backward()
    assert leaf.grad.abs().amax((1, 2, 3)).gt(0).all()
    clips = media[:, None].expand(-1, 3, -1, -1, -1)
    assert torch.allclose(reward(clips, prompts).values, reward(media, prompts).values, atol=1e-3)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Plain images for each of the run's prompts."""
    rows = []
    for i, prompt in enumerate(["a red cube", "a blue ball", "a cat", "two dogs", "a small hat", "a tree"]):
        Image.new("RGB", (40, 32), (40 * i, 90, 0)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"prompt": prompt, "image": f"{i}.png"}))
    (tmp_path / "references.jsonl").write_text("\n".join(rows))
    return tmp_path / "references.jsonl"


def test_the_policy_waits_in_a_run_and_a_resumed_run_ends_with_the_same_bits(table, model, tmp_path):
    """Two prompts a rollout: plain images are now ahead of a random generator's, now behind."""
    reward = {**TUNED, "references": str(table), "lr": 3e-4}

    def run(name, steps, resume=False):
        (tmp_path / name).mkdir(exist_ok=True)
        config = settings(tmp_path / name, model, reward=reward, train={"steps": steps}, evaluate={"every": 0})
        train(config, resume=resume)
        return config

    whole = run("whole", 6)
    rows = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["event"] == "train"]
    waited = [row["refresh/real"] < row["refresh/fake"] for row in rows]
    assert set(waited) == {True, False}
    assert [("grad_norm" not in row) for row in rows] == waited
    run("half", 3)
    half = run("half", 6, resume=True)
    for role in ("policy", "behaviour", "ema"):
        assert policy_gap(final_tensors(whole), final_tensors(half), role) == 0


def test_references_are_read_with_their_prompts(table):
    found = read_table(str(table))
    assert len(found) == 6
    assert found["a tree"][0].shape == (3, 32, 40)
    renders = read_table("shapes")
    assert sum(map(len, renders.values())) == RENDERS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}', "line 1 should have a prompt and an image"),
        ('{"prompt": "a", "image": "0.png"}\nred', "line 2: not JSON"),
        ('{"prompt": "a", "image": "none.png"}', "none.png cannot be read"),
        ("[1]", "line 1: expected an object"),
        ("\n", "has no rows"),
    ],
)
def test_references_that_cannot_be_read_are_named(table, text, said):
    table.write_text(text)
    with pytest.raises(RewardError, match=rf"reward 'adversarial_pick_score': references: .*{said}"):
        rewards.parse({**TUNED, "references": str(table)}).build()
    with pytest.raises(RewardError, match="cannot be read as a table"):
        rewards.parse({**TUNED, "references": str(table.parent)}).build()


def test_what_it_cannot_do_is_said():
    with pytest.raises(RewardError, match="layers: 9 is more than the 4 layers of the vision tower"):
        rewards.parse({**TUNED, "references": "shapes", "layers": 9}).build()
    with pytest.raises(ValueError, match="float32"):
        rewards.parse({**TUNED, "references": "shapes", "dtype": "bfloat16"})
    with pytest.raises(RewardError, match="trains alongside a policy"):
        rewards.parse({**TUNED, "references": "shapes"}).build().fixed()
