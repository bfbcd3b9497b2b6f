"""SRPO: samples recovered from known noise, steps between noise levels, words that steer the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_reward_backprop import AIM, NOISE, ONE, THETA, H, quadratic, toy
from tiny_run import settings
from torch import Tensor

from align.maths import direct, losses
from align.recipes.gradients.srpo import SRPO
from generators.noise import seeded_noise

SPAN, ALL = (0.2, 0.9), (0.0, 1.0)


def draw(seed: int, *shape: int) -> Tensor:
    return seeded_noise([seed], shape).double()


@pytest.mark.parametrize("shape", [(4, 3, 4, 4), (4, 3, 2, 4, 2)], ids=["image", "video"])
def test_a_sample_is_recovered_exactly_where_the_velocity_is_exact(shape: tuple[int, ...]) -> None:
    """At any noise level, in both directions."""
    x0, eps = draw(1, *shape)[0], draw(2, *shape)[0]
    u = torch.tensor([0.05, 0.3, 0.6, 0.99], dtype=torch.double)
    for made in direct.jumps(u, 0.1, SPAN, ALL, ALL)[:2], (torch.full((4,), 1.0), torch.tensor([0.0, 0.2, 0.5, 0.9])):
        for start in range(0, len(made[0]), 4):
            t, t_next = (one[start : start + 4].double() for one in made)
            found = direct.direct_align(x0, eps, eps - x0, t, t_next)
            torch.testing.assert_close(found, x0, atol=1e-12, rtol=0)


def test_an_error_of_the_velocity_moves_the_sample_by_the_share_of_the_step() -> None:
    """``(t' - t) / (1 - t')``: of 0.6 to 0.5 it is -0.2, of 0.4 to 0.5 it is +0.2."""
    x0, eps, error = (draw(seed, 1, 3, 2, 2) for seed in range(3))
    for t, share in ((0.6, -0.2), (0.4, 0.2), (0.5, 0.0)):
        v = (eps - x0 + error).requires_grad_()
        found = direct.direct_align(
            x0, eps, v, torch.tensor([t], dtype=torch.double), torch.tensor([0.5], dtype=torch.double)
        )
        torch.testing.assert_close(found, x0 + share * error, atol=1e-12, rtol=0)
        (slope,) = torch.autograd.grad(found.sum(), v)
        torch.testing.assert_close(slope, torch.full_like(v, share), atol=1e-12, rtol=0)


def test_steps_have_the_same_level_and_length_in_both_directions() -> None:
    u = torch.tensor([0.02, 0.5, 0.97])
    made = direct.jumps(u, 0.1, SPAN, (0.1, 0.25), (0.3, 0.01))
    assert made.inverts.tolist() == [False] * 3 + [True] * 3
    wanted = [0.2 + 0.7 * place for place in (0.04, 0.6, 1.0, 0.0, 0.4, 0.94)]
    torch.testing.assert_close(made.t, torch.tensor(wanted))
    torch.testing.assert_close(made.t_next, (0.2 + 0.7 * u).repeat(2))
    k = [*(0.1 + 0.15 * u).tolist(), 0.3, 0.3 - 0.29 * 0.4, 0.3 - 0.29 * 0.94]
    torch.testing.assert_close(made.k, torch.tensor(k))
    assert len(direct.jumps(u, 0.1, SPAN, (0.1, 0.25), None).t) == 3


def test_the_relative_preference_keeps_k_of_what_both_words_share() -> None:
    one = torch.tensor([0.3, 0.8])
    torch.testing.assert_close(direct.relative_preference(one, one, 0.25), 0.25 * one)
    torch.testing.assert_close(direct.relative_preference(one, one - 0.1, 0.0), torch.full((2,), 0.1))


def exact(recipe: SRPO, rollout: Any) -> tuple[Tensor, Tensor]:
    """Loss ``[2]`` of the recipe on the linear generator without words, and its derivative by theta."""
    theta = torch.tensor(THETA, dtype=torch.double, requires_grad=True)
    x0 = (ONE * (1 - THETA * H) ** 5).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    u = torch.tensor([float(recipe_u(recipe, rollout, n)) for n in range(2)])
    made = direct.jumps(u, recipe.stride, recipe.t_range, recipe.extra, recipe.extra_inverted)
    total = torch.zeros(2, dtype=torch.double)
    for start in range(0, len(made.t), 2):
        t, t_next, k = (one[start : start + 2].double() for one in made[:3])
        v = theta * losses.x_at(x0, NOISE, t)
        seen = x0 + losses.column((t_next - t) / (1 - t_next), x0) * (v - (NOISE - x0))
        total = total + k * (seen.flatten(1).mean(1) - AIM) ** 2
    total = total / (len(made.t) // 2)
    (slope,) = torch.autograd.grad(total.sum(), theta)
    return total.detach(), slope


def recipe_u(recipe: SRPO, rollout: Any, sample: int) -> Tensor:
    from align.recipes.base import stratified_times

    return stratified_times([rollout.seeds[sample]], recipe.timesteps, ALL)


@pytest.mark.parametrize("inverted", [(0.3, 0.01), None])
def test_the_gradient_is_that_of_the_recovered_samples(inverted: tuple[float, float] | None) -> None:
    recipe = SRPO(t_range=SPAN, margin=None, extra_inverted=inverted)
    loss, slope, rollout, bench = toy(recipe, NOISE)  # type: ignore[arg-type]
    value, wanted = exact(recipe, rollout)
    torch.testing.assert_close(loss.value.detach().double(), value, atol=1e-6, rtol=1e-5)
    assert slope == pytest.approx(float(wanted), rel=1e-4)
    x0 = ONE * (1 - THETA * H) ** 5
    torch.testing.assert_close(loss.scores.values.double(), -((x0 - AIM) ** 2), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss.media[:, 0, 0, 0].double(), x0)  # the log is of the samples themselves
    assert bench.generator.calls == 2 * 5 + len(loss.value) * recipe.rows_per_term(None)  # type: ignore[attr-defined]


def test_words_go_before_the_prompt_and_change_places_where_a_step_inverts() -> None:
    asked: list[list[str]] = []

    def noted(media: Tensor, prompts: list[str], group: Tensor) -> Tensor:
        asked.append(prompts)
        return quadratic(media, prompts, group)

    toy(SRPO(positive=("real",), negative=("flat",)), NOISE, function=noted)  # type: ignore[arg-type]
    real, flat = ["real. a"] * 2, ["flat. a"] * 2
    assert asked == [["a"] * 2 + real + flat + flat + real]


def test_a_reward_of_the_wanted_word_alone_raises_it_by_both_steps() -> None:
    """Down the gradient of the loss the recovered samples of the denoising step have more of what the word means."""

    def worded(media: Tensor, prompts: list[str], group: Tensor) -> Tensor:
        sign = torch.tensor([1.0 if text.startswith("bright") else -1.0 for text in prompts])
        return sign * media.flatten(1).mean(1)

    ones = torch.ones_like(NOISE)
    for inverted in ((0.3, 0.01), None):
        recipe = SRPO(positive=("bright",), negative=("dark",), margin=None, extra_inverted=inverted)
        slope = toy(recipe, ones, function=worded)[1]  # type: ignore[arg-type]
        assert slope > 0  # less theta is a brighter sample, because v = theta x points from sample to noise


def test_without_words_the_two_steps_undo_each_other() -> None:
    """For a linear reward and equal k; so the config refuses it."""

    def brightness(media: Tensor, prompts: list[str], group: Tensor) -> Tensor:
        return media.flatten(1).mean(1)

    slopes = []
    for inverted in ((0.2, 0.2), None):
        recipe = SRPO(extra=(0.2, 0.2), extra_inverted=inverted, margin=None, stride=1e-3, t_range=(0.49, 0.51))
        slopes.append(toy(recipe, NOISE.abs(), function=brightness)[1])  # type: ignore[arg-type]
    assert abs(slopes[0]) < 1e-2 * abs(slopes[1])


def test_a_margin_ends_the_gradient() -> None:
    for margin, moves in ((-10.0, False), (10.0, True)):
        loss, slope, *_ = toy(SRPO(margin=margin), NOISE)  # type: ignore[arg-type]
        assert (slope != 0) == moves
        assert bool((loss.value > 0).all()) == moves


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"t_range": [0.9, 0.2]}, r"recipe.t_range\s.*should rise, given \[0.9, 0.2\]"),
        ({"t_range": [0.2, 1.2]}, "less than or equal to 1"),
        ({"template": "{prompt}"}, r"recipe.template\s.*should contain \{word\}"),
        ({"stride": 0}, "greater than 0"),
        ({"positive": []}, r"recipe.extra_inverted\s.*without control words the inverting step undoes"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        settings(tmp_path, model, {"kind": "srpo", "positive": ["big"], **options})
    with pytest.raises(ValueError, match="srpo follows the reward's gradient, and shapes has none"):
        settings(tmp_path, model, "srpo", reward={"kind": "shapes"})
