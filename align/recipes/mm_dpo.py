"""Preference pairs with a beta that grows with the gap of their scores."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.maths import weights
from align.recipes.base import Tensor
from align.recipes.flow_dpo import FlowDPO


class MMDPO(FlowDPO):
    """MM-DPO: beta (1 + extra (1 - exp(-rate gap))), so that clear pairs weigh more (MM-RLHF, arXiv 2502.10391)

    Without scores in a table of pairs every gap is 1.
    """

    kind: Literal["mm_dpo"] = "mm_dpo"  # type: ignore[assignment]
    rate: float = Field(0.5, gt=0, description="rate at which beta grows with the gap, in 1 / score")
    extra: float = Field(0.5, ge=0, description="largest relative increase of beta; 0 = flow_dpo")

    def preference(self, scores: Tensor) -> dict[str, Any]:
        """The pairs' betas."""
        gap = scores[:, 0] - scores[:, 1]
        return {"beta": weights.beta_of_gap(gap, self.beta, self.rate, self.extra)}
