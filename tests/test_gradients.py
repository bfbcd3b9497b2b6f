"""Whether scores have a gradient is known from settings, and the gradient of those that have one reaches the media.

The fixture ``declared`` in ``conftest.py`` compares the declaration with every reward that any test builds.
"""

from __future__ import annotations

import pytest
import torch

import rewards
from rewards.base import RewardError, all_known
from rewards.scopes import declared

JUDGED = {"judge": {"model": "shapes", "dtype": "float32"}}
ENDPOINT = {"judge": {"url": "http://127.0.0.1:1/v1", "model": "m"}}
CLIP = {"kind": "clip", "model": "shapes"}


def mixture(*added: object, gate: object = None) -> dict[str, object]:
    members = {f"m{number}": {"reward": reward} for number, reward in enumerate(added)}
    return {"kind": "mixture", "parts": members | ({"gate": {"reward": gate, "gate": 0.0}} if gate else {})}


WITH = [
    {"kind": "adversarial", "references": "shapes", "model": "shapes"},
    {"kind": "adversarial_pick_score", "references": "shapes", "model": "shapes", "processor": "shapes"},
    CLIP,
    {"kind": "clip_score", "model": "shapes", "variant": "reno"},
    {"kind": "goal_baseline", "model": "shapes", "baseline": ["a shape"]},
    {"kind": "pick_score", "model": "shapes", "processor": "shapes"},
    {"kind": "feature_similarity", "model": "shapes"},
    "ssim",
    {"kind": "identity_consistency", "model": "shapes"},
    "motion_degree",
    "kinetic_residual",
    {"kind": "yes_probability", **JUDGED},
    {"kind": "digit_judge", **JUDGED},
    {"kind": "paco", "rows": 1, "columns": 2, **JUDGED},
    {"kind": "prompt_echo", **JUDGED},
    {"kind": "reward_dance", **JUDGED},
    {"kind": "consistent", "reward": CLIP},
    {"kind": "placed", "reward": CLIP},
    {"kind": "segmental", "reward": CLIP},
    mixture(CLIP, "ssim", gate="shapes"),
]
"""Rewards with a gradient, built from weights that need no download."""


@pytest.mark.parametrize("tree", WITH, ids=lambda tree: tree if isinstance(tree, str) else tree["kind"])
def test_the_gradient_that_settings_declare_reaches_the_media(tree: object) -> None:
    settings = rewards.parse(tree)
    assert settings.gradient() is True
    random = torch.Generator().manual_seed(0)
    shape = (2, 4, 3, 32, 32) if settings.kind in ("identity_consistency", "motion_degree", "kinetic_residual") else (
        2, 3, 32, 32)  # fmt: skip
    media, image = torch.rand(shape, generator=random), torch.rand(2, 3, 32, 32, generator=random)
    reward = settings.build()
    inputs = {"image": image} if reward.wants else None
    values = reward(media.requires_grad_(), ["a red circle", "a red circle"], torch.tensor([0, 0]), inputs).values
    assert values.isfinite().all()
    (grad,) = torch.autograd.grad(values.sum(), media)
    assert grad.isfinite().all()
    assert (grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize(
    "tree",
    ["compressibility", "shapes", "shapes_edit", "shapes_fill", "shapes_video", {"kind": "cached", "reward": CLIP},
     *({"kind": kind, **JUDGED} for kind in ("pairwise", "think_score", "deeptrace", "listener", "rubric",
                                             "unified_reward", "video_judge")),
     mixture(CLIP, "compressibility"), {"kind": "placed", "reward": "shapes"}],
    ids=str,
)  # fmt: skip
def test_rewards_without_a_gradient_declare_it(tree: object, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = rewards.parse(tree)
    assert settings.gradient() is False
    assert not settings.build().differentiable


@pytest.mark.parametrize(
    ("tree", "known"),
    [
        ({"kind": "hpsv2", "backend": "package"}, False),
        ({"kind": "image_reward", "backend": "package"}, False),
        ({"kind": "hpsv2"}, True),
        ({"kind": "yes_probability", **ENDPOINT}, False),
        ({"kind": "motion_degree", "flow": "m:f"}, None),
        ("m:f", None),
        ({"kind": "m:f", "differentiable": True}, True),
        ({"kind": "m:f", "differentiable": False}, False),
        ({"kind": "remote", "url": "http://127.0.0.1:1"}, False),
        ({"kind": "pool", "reward": CLIP}, False),
        ({"kind": "placed", "reward": "m:f"}, None),
        (mixture(CLIP, "m:f"), None),
        (mixture(CLIP, "m:f", "shapes"), False),
        (mixture(CLIP, gate="m:f"), True),
    ],
    ids=str,
)
def test_gradients_are_known_before_anything_is_built(tree: object, known: bool | None) -> None:
    assert rewards.parse(tree).gradient() is known


def test_all_are_known_only_where_none_can_change_it() -> None:
    assert [all_known(answers) for answers in ([True, True], [True, None], [None, False])] == [True, None, False]


def test_a_settings_class_declares_its_own_gradient(tmp_path, monkeypatch) -> None:
    (tmp_path / "declaring.py").write_text(
        "from rewards.base import Reward, RewardSettings\n"
        "class Mine(RewardSettings):\n"
        "    kind: str\n"
        "    def build(self, device='cpu'):\n"
        "        return Reward('mine', lambda media, *_: media.mean((1, 2, 3)), differentiable=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = rewards.parse("declaring:Mine")
    assert settings.gradient() is None
    assert settings.build().differentiable
    with pytest.raises(RewardError, match="is a RewardSettings class, which declares differentiable itself"):
        rewards.parse({"kind": "declaring:Mine", "differentiable": False}).build()


def test_a_kind_declares_what_its_default_settings_do() -> None:
    kinds = ("clip", "pairwise", "mixture", "consistent", "remote")
    found = [declared(rewards.kinds()[kind]) for kind in kinds]
    assert found == [(True, "sample"), (False, "group"), (None, None), (None, "group"), (False, None)]
