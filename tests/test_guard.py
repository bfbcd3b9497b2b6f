"""Rewards that write into what they are given: they are named, and nobody after them sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rewards
from rewards.base import Reward, RewardError, Scores
from rewards.guard import latent_loans

MEDIA = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES = ["a", "a", "b", "b"]


def normalises(media, prompts):
    media -= media.mean()
    return media.flatten(1).mean(1)


def by_numpy(media, prompts):
    media.numpy()[:] *= 0.5
    return [0.5] * len(prompts)


def by_data(media, prompts):
    media.data.mul_(2)
    return [0.5] * len(prompts)


def sorts(media, prompts):
    media.numpy().reshape(-1).sort()
    return [0.5] * len(prompts)


def one_pixel(media, prompts):
    media[3, 2, 7, 7] += 1e-7
    return [0.5] * len(prompts)


def then_fails(media, prompts):
    media.zero_()
    raise ValueError("after the damage")


def resizes(media, prompts):
    media.resize_(1, 3, 8, 8)
    return [0.5] * len(prompts)


WRITERS = [normalises, by_numpy, by_data, sorts, one_pixel, then_fails, resizes]


@pytest.mark.parametrize("function", WRITERS, ids=lambda function: function.__name__)
def test_a_reward_that_writes_into_media_is_named(function: Callable[..., Any]) -> None:
    reward = rewards.parse(f"test_guard:{function.__name__}").build()
    before = MEDIA.clone()
    with pytest.raises(RewardError, match=rf"'{function.__name__}' changes the media .*media.clone\(\)"):
        reward(MEDIA, NAMES)
    assert torch.equal(MEDIA, before)


@pytest.mark.parametrize("wrap", ["mixture", "placed", "segmental", "cached", "direct"])
def test_the_offender_inside_another_reward_is_named(wrap: str, tmp_path) -> None:
    inner = {"kind": "test_guard:normalises"}
    settings: dict[str, Any] = {
        "mixture": {"kind": "mixture", "parts": {"a": {"reward": inner}, "b": {"reward": "compressibility"}}},
        "placed": {"kind": "placed", "reward": inner},
        "segmental": {"kind": "segmental", "reward": inner},
        "cached": {"kind": "cached", "reward": inner, "folder": str(tmp_path)},
    }
    made = Reward("normalises", lambda media, prompts, group: normalises(media, prompts))
    reward = made if wrap == "direct" else rewards.parse(settings[wrap]).build()
    before = MEDIA.clone()
    with pytest.raises(RewardError, match="'normalises' changes the media"):
        reward(MEDIA, NAMES)
    assert torch.equal(MEDIA, before)


def test_inputs_group_prompts_and_rows_are_safe_too() -> None:
    image, group, rows = MEDIA.clone(), torch.tensor([0, 0, 1, 1]), [{"tags": ["x"]} for _ in range(4)]

    def spoils(what: str) -> Callable[..., Any]:
        def function(media, prompts, group, image, metadata):
            prompts[0] = "other"
            metadata[0]["tags"].append("y")
            metadata.clear()
            {"image": image, "group": group}[what].zero_()
            return [0.0] * 4

        return function

    for what in ("image", "group"):
        reward = Reward("spoils", spoils(what), wants=("image", "metadata"))
        with pytest.raises(RewardError, match=f"changes the {what} it is given"):
            reward(MEDIA, prompts := list(NAMES), group, {"image": image, "metadata": rows})
        assert prompts == NAMES
        assert rows == [{"tags": ["x"]}] * 4
        assert torch.equal(image, MEDIA)
        assert group.tolist() == [0, 0, 1, 1]


def test_media_that_are_kept_or_returned_are_not_shared() -> None:
    kept: list[Tensor] = []

    def keeps(media, prompts, group):
        kept.append(media)
        return Scores(media.flatten(1)[:, 0], parts={"view": media.flatten(1)[:, 1]})

    media = MEDIA.clone()
    scores = Reward("keeps", keeps)(media, NAMES)
    kept[0].zero_()
    assert torch.equal(media, MEDIA)
    assert torch.equal(scores.values, MEDIA.flatten(1)[:, 0])
    assert torch.equal(scores.parts["view"], MEDIA.flatten(1)[:, 1])


def test_reading_is_free() -> None:
    """NaN, views without memory of their own, and gradients pass."""
    media = MEDIA.clone().masked_fill(MEDIA > 0.9, torch.nan).requires_grad_()
    reward = Reward("mean", lambda media, prompts, group: media.flatten(1).nanmean(1), differentiable=True)
    (slope,) = torch.autograd.grad(reward(media, NAMES).values.sum(), media)
    assert slope.abs().sum() > 0
    still = MEDIA[:1].expand(4, -1, -1, -1)
    assert reward(still, NAMES).values.isfinite().all()
    with torch.inference_mode():
        assert reward(MEDIA * 1, NAMES).values.isfinite().all()


def test_a_reward_that_learns_cannot_change_the_rollout() -> None:
    class Learner:
        instead = False

        def fit(self, media: Tensor, prompts: list[str]) -> dict[str, float]:
            media.numpy()[:] = 0
            return {}

    reward = Reward("learner", normalises, refresh=Learner())
    reward = dataclasses.replace(reward, name="learner")
    media = MEDIA.clone()
    assert reward.refresh is not None
    with pytest.raises(RewardError, match="'learner', while it is trained, changes the media"):
        reward.refresh.fit(media, NAMES)
    assert torch.equal(media, MEDIA)


def test_a_latent_reward_cannot_change_latents() -> None:
    def judge(x, t, prompts):
        x.detach().numpy()[:] = 0
        return x.flatten(1).sum(1)

    x = MEDIA.clone()
    with pytest.raises(RewardError, match="'judge' changes the x_t"):
        latent_loans(judge)(x, torch.ones(4), NAMES)
    assert torch.equal(x, MEDIA)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(latent_loans(lambda x, t, p: x.flatten(1).sum(1))(x, torch.ones(4), NAMES).sum(), x)
    assert torch.equal(slope, torch.ones_like(x))


def test_results_of_wrong_kinds_and_sys_exit_are_explained() -> None:
    def exits(media, prompts, group):
        raise SystemExit(3)

    with pytest.raises(RewardError, match=r"'exits' called sys.exit\(3\)"):
        Reward("exits", exits)(MEDIA, NAMES)
    with pytest.raises(RewardError, match="reasons should be a mapping, got list"):
        Reward("odd", lambda *_: Scores(torch.zeros(4), reasons=["why"]))(MEDIA, NAMES)
    why = Reward("escapes", lambda *_: Scores(torch.full((4,), np.nan), {0: "\x1b[31mred"}))(MEDIA, NAMES).reasons
    assert why[0] == "red"
    assert why[1] == "the reward returned nan"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("1 / 0", r"ZeroDivisionError: division by zero .*mine.py:1"),
        ("def f(:", r"SyntaxError"),
        ("class f:\n    def __init__(self): raise OSError('no weights')", r"OSError: no weights \(mine.py, line 2\)"),
    ],
)
def test_code_that_fails_while_it_is_loaded(code: str, said: str, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(RewardError, match=said):
        rewards.parse(f"{tmp_path}/mine.py:f").build()
