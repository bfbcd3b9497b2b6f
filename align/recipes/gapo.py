"""Preference pairs weighted by the gap of their scores."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.maths import weights
from align.recipes.base import Tensor
from align.recipes.flow_dpo import FlowDPO
from alignflow.errors import TrainingError


class GAPO(FlowDPO):
    """GAPO: a pair weighs alpha^(winner / scale) - alpha^(loser / scale) (arXiv 2504.10044)

    Without scores in a table of pairs the better sample has 1 and the other 0.
    """

    kind: Literal["gapo"] = "gapo"  # type: ignore[assignment]
    beta: float = Field(5000.0, gt=0, description="beta of the preference, as for flow_dpo")
    alpha: float = Field(
        2.0, gt=1, description="base of the weights; larger values favour pairs at the top of the scale"
    )
    scale: float = Field(1.0, gt=0, description="highest possible score; a higher one is an error")

    def preference(self, scores: Tensor) -> dict[str, Any]:
        """The pairs' weights.

        Raises:
            TrainingError: a score is above scale, so that its weight has no bound.
        """
        if (highest := scores.max().item()) > self.scale:
            raise TrainingError(f"gapo: a score is {highest:g}; raise recipe.scale, now {self.scale:g}")
        winner, loser = scores.unbind(1)
        return {"beta": self.beta, "weight": weights.gap_power(winner, loser, self.alpha, self.scale)}
