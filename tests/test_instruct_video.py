"""InstructVideo: from a source at a noise level to the sample, with the gradient of the last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_reward_backprop import AIM, NOISE, ONE, STEPS, THETA, H, Linear, close, quadratic, toy
from tiny_run import settings
from torch import Tensor

from align.maths import losses
from align.policy.roles import Roles
from align.recipes.gradients.instruct_video import InstructVideo
from align.rollout.bench import Bench
from rewards import parse
from rewards.base import Reward

SOURCE = ONE * (1 - THETA * H) ** STEPS


def noised(rollout: Any, t: float) -> Tensor:
    """The source ``[2]`` at ``t``, of which media are the means."""
    sample = torch.arange(2)
    eps = rollout.noise(sample, torch.zeros_like(sample)).double().flatten(1).mean(1)
    return (1 - t) * SOURCE + t * eps


@pytest.mark.parametrize("start", [0.2, 0.6, 1.0])
def test_it_is_the_rest_of_the_sampler_from_the_noised_source(start: float) -> None:
    taken = round(start * STEPS)
    loss, slope, rollout, bench = toy(InstructVideo(start=start), NOISE)
    x0 = noised(rollout, taken * H) * (1 - THETA * H) ** taken
    close(loss.value.detach(), (x0 - AIM) ** 2)
    by_theta = -H * x0 / (1 - THETA * H)  # of the last step alone
    assert slope == pytest.approx(float((2 * (x0 - AIM) * by_theta).sum()), rel=1e-4)
    assert bench.generator.calls == 2 * (STEPS + taken)  # type: ignore[attr-defined]


def test_the_source_is_the_base_and_not_the_policy() -> None:
    """After a step of theta only the steps from the source are the policy's."""
    recipe = InstructVideo(start=0.2)
    rollout = toy(recipe, NOISE)[2]
    generator = Linear()
    roles = Roles([("theta", generator.theta)], ["reference"])
    generator.theta.data += 0.1
    roles.policy_changed()
    bench = Bench(generator, {"policy": roles}, reward=Reward("quadratic", quadratic, differentiable=True))  # type: ignore[arg-type]
    with bench.acting("policy"):
        loss = recipe.loss(recipe.terms(rollout, ONE), rollout, bench)
    x0 = noised(rollout, H) * (1 - (THETA + 0.1) * H)
    close(loss.value.detach(), (x0 - AIM) ** 2)


def test_a_short_way_leaves_the_source_as_it_is() -> None:
    """With t* towards 0 the sample is the source, and its gradient ends: a step's length is t*."""
    gaps, slopes = [], []
    for steps in (5, 50, 500):
        generator = Linear()
        sample, grid = torch.arange(2), generator.times(steps)
        rollout = toy(InstructVideo(), NOISE)[2]
        eps = rollout.noise(sample, torch.zeros_like(sample)).double()
        t = grid[-2]
        x = losses.x_at(NOISE, eps, t)
        x0 = losses.x0_from(x, generator.velocity(x, t, rollout.cond), t)
        gaps.append(float((x0 - NOISE).detach().abs().max()))
        slopes.append(float(torch.autograd.grad(x0.sum(), generator.theta)[0].abs()))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert slopes[0] > 5 * slopes[1] > 25 * slopes[2]


@pytest.mark.parametrize(("attenuation", "wanted"), [(1.0, 0.7407583), (0.0, 0.0)])
def test_the_published_loss_of_four_segments_of_sixteen_frames(attenuation: float, wanted: float) -> None:
    """``1 - mean_i w_i r`` for r = 1, the loss of ``margin: 1``."""
    inner = {"kind": "tiny_run:mean_pixel", "differentiable": True}
    segmental = {"kind": "segmental", "reward": inner, "attenuation": attenuation, "pick": "first", "normalise": False}
    scores = parse(segmental).build()(torch.ones(2, 16, 3, 4, 4), ["a", "b"])
    loss = losses.reward_backprop(scores.values[None], torch.ones(1, 2, dtype=torch.bool), margin=1.0).value
    torch.testing.assert_close(loss, torch.full((2,), wanted), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": 0.3}, r"recipe.start\s.*less than one of the sampler's 3 steps"),
        ({"start": 0.0}, "greater than 0"),
        ({"start": 0.7, "last": 3}, r"recipe.last\s.*at most 2, the sampler's steps"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        settings(tmp_path, model, {"kind": "instruct_video", **options})
