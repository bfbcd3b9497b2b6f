"""Policy gradient with a value and an advantage for every sampling step."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from align.maths import advantages
from align.maths import credit as formulas
from align.recipes.base import Fraction, Need, Scores, Tensor, torch
from align.recipes.grpo import GRPO


class VGPO(GRPO):
    """VGPO: policy gradient with an advantage of every step, from rewards of predicted samples: our reconstruction

    A step's reward is that of the clean sample predicted after it, and its value adds the discounted rewards of the
    later steps. The advantage weighs steps by value and, in the first steps, keeps a share of the value itself, which
    equal samples share too (arXiv 2512.12387, whose exact formula was not available). Rewards below 0 are moved up
    together until the lowest is 0. Each rollout decodes and scores every trained step.
    """

    needs: ClassVar[tuple[Need, ...]] = ("trajectory", "step_scores")
    kind: Literal["vgpo"] = "vgpo"  # type: ignore[assignment]
    normalise_by: advantages.Divisor = Field("group", description="divisor of a step's advantage, as for grpo")
    discount: Fraction = Field(0.9, description="factor of a later step's reward in the value; 0 = only its own")
    anchor: float = Field(
        0.1, ge=0, description="factor of the value itself in the advantage, in 1 / reward; 0 = differences only"
    )
    anchor_steps: int = Field(5, ge=0, description="number of first trained steps that use anchor")

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Advantages ``[N, S]``."""
        assert scores.steps is not None
        # a prediction is made before its step: the next one, or in the end the sample, is what the step led to
        rewards = torch.cat([scores.steps[:, 1:], scores.values[:, None]], 1).double()
        rewards = torch.where(rewards.isfinite() & scores.values.isfinite()[:, None], rewards, torch.nan)
        lowest = rewards[rewards.isfinite()].min() if rewards.isfinite().any() else rewards.new_zeros(())
        values = formulas.temporal_value(rewards - lowest.clamp_max(0), self.discount)
        return formulas.anchored(values, group, self.anchor, self.anchor_steps, self.normalise_by, self.advantage_clip)
