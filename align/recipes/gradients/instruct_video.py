"""Reward gradients from part of the way: samples of the base, re-noised and finished by the policy."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from align.maths import losses
from align.recipes.base import Bench, Scored, Tensor, torch
from align.recipes.gradients.reward_backprop import RewardBackprop


class InstructVideo(RewardBackprop):
    """InstructVideo: the last steps from a noised source, reward gradient through the last one (arXiv 2312.12490)

    The published source is a video from a dataset; here it is a sample of the base for the prompt, with new noise. The
    published reward is ``segmental`` with attenuation around ``hpsv2``, and its loss ``margin: 1``.
    """

    kind: Literal["instruct_video"] = "instruct_video"  # type: ignore[assignment]
    start: float = Field(0.6, gt=0, le=1, description="share of the sampler's steps that are taken from the source")

    def taken(self, steps: float) -> float:
        """Network calls of the steps from the source."""
        return math.floor(self.start * steps + 1e-9) if math.isfinite(steps) else steps

    def check(self, config: Any) -> list[tuple[str, str]]:
        """There is a step from the source."""
        steps = getattr(getattr(config.rollout, "sampler", None), "steps", math.inf)
        if self.taken(steps) < 1:
            return [("recipe.start", f"is less than one of the sampler's {steps} steps: raise it")]
        return super().check(config)

    def roles(self, config: Any) -> tuple[str, ...]:
        """The base, which makes the source."""
        return ("reference",)

    def begin(self, sample: Tensor, rollout: Scored, bench: Bench, left: int) -> tuple[Tensor, Tensor, Any]:
        """The base's samples at the time from which the policy continues."""
        assert rollout.sampler is not None
        skip = rollout.sampler.steps - int(self.taken(rollout.sampler.steps))
        grid, step = rollout.course(sample, bench.generator)
        with bench.role("reference"):
            source = bench.unroll(
                rollout.latents[sample], grid, rollout.cond_of(sample), guidance=rollout.guidance, step=step, last=0
            )
        times, step = rollout.course(sample, bench.generator, left, skip)
        noise = rollout.noise(sample, torch.full_like(sample, self.noises))
        return losses.x_at(source, noise, times[0]), times, step
