"""Preference between references of a subject and the model's own samples, with labels that may be wrong."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.maths.pairs import Pairs, best_worst
from align.recipes.base import Scored, Tensor, torch
from align.recipes.flow_dpo import FlowDPO, PairTerms


class RPO(FlowDPO):
    """RPO: flow matching on references, and a preference with the label sigmoid(score - score) (arXiv 2407.12164)

    In a table of pairs ``chosen`` is a reference image and ``rejected`` a sample of the base. Their scores may be in
    any order, since they are the label alone. The paper samples the label; we take its mean, which has the same mean
    gradient. Online the better of two samples is the reference, which is ours.
    """

    kind: Literal["rpo"] = "rpo"  # type: ignore[assignment]
    any_order = True
    beta: float = Field(2.0, gt=0, description="beta of the preference, as for flow_dpo; 2 equals the paper's 1")
    flow_weight: float = Field(1.0, ge=0, description="weight of the reference's flow-matching error; 0 = none")
    sharpness: float = Field(1.0, gt=0, description="factor of the score difference in the label's sigmoid")

    def chosen(self, rollout: Scored, credit: Tensor) -> Pairs:
        """Pairs of a file whatever their scores."""
        stored = rollout.sampler is None
        return best_worst(credit, rollout.group, -1.0) if stored else super().chosen(rollout, credit)

    def preference(self, scores: Tensor) -> dict[str, Any]:
        """The probability that the winner is better."""
        return {"beta": self.beta, "label": torch.sigmoid(self.sharpness * (scores[:, 0] - scores[:, 1]))}

    def to_imitate(self, terms: PairTerms, rollout: Scored, won: Tensor, lost: Tensor) -> Tensor:
        """The references: of a file the chosen samples, which are before the rejected ones."""
        if rollout.sampler is not None:
            return won
        return torch.where((terms.sample < terms.loser).to(won.device), won, lost)
