"""Policy gradient with more weight on samples for which its reward is reliable."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.maths import advantages, weights
from align.recipes.base import Scores, Tensor, torch
from align.recipes.grpo import GRPO
from alignflow.errors import TrainingError
from alignflow.words import listing


class PrefPaint(GRPO):
    """PrefPaint: policy gradient with more weight on samples for which a trained reward is trusted (arXiv 2410.21966)

    The weight is exp(bias - rate distance) in [1, 2.21]. The distance of a sample from the features that the reward was
    trained on is a part of the scores of ``reward: {kind: trained}``. The published sampler is ``ddim`` at noise level
    1, of which five random steps are trained; those of a window follow one another.
    """

    kind: Literal["prefpaint"] = "prefpaint"  # type: ignore[assignment]
    normalise_by: advantages.Divisor = Field("group", description="divisor of the advantage, as for grpo")
    advantage_clip: float = Field(10.0, gt=0, description="maximum absolute advantage; larger ones are clipped")
    rate: float = Field(0.05, ge=0, description="decrease of the log-weight per unit of distance; 0 = none")
    bias: float = Field(0.7, description="log-weight at distance 0")
    bounds: tuple[float, float] = Field((1.0, 2.21), description="[lowest, highest] weight")
    part: str = Field(
        "distance", description="part of the reward with the distance; of a member of a mixture: NAME/distance"
    )

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Needs a reward that may have the part."""
        found, reward = super().check(config), config.reward
        if not 0 < self.bounds[0] <= self.bounds[1]:
            found.append(("recipe.bounds", f"should be [lowest, highest] above 0, given {list(self.bounds)}"))
        inside = hasattr(reward, "parts") or hasattr(reward, "reward")
        if reward is None or inside or reward.kind == "trained" or reward.compares() is None:
            return found
        said = f"prefpaint weights samples by the distance that kind 'trained' gives, and {reward.kind} gives none"
        return [*found, ("reward.kind", said)]

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Advantages ``[N]`` times the trust.

        Raises:
            TrainingError: the reward gives no such part.
        """
        if not scores.values.isfinite().any():
            return torch.zeros_like(scores.values)
        if self.part not in scores.parts:
            given = listing(scores.parts) or "none"
            raise TrainingError(
                f"recipe.part: the reward has no part {self.part!r}, its parts: {given}; `alignflow reward train` "
                "writes rewards with a distance"
            )
        trust = weights.feature_trust(scores.parts[self.part], self.rate, self.bias, *self.bounds)
        return self.advantage(scores, group, self.advantage_clip) * torch.nan_to_num(trust, nan=self.bounds[0])
