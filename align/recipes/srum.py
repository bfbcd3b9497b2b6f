"""Flow matching on own samples, weighted by a score of each region and of the whole image."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.data.media import from_bytes
from align.maths import regions
from align.recipes.base import Bench, ForwardRecipe, Loss, NoisedTerms, Scored, Tensor
from alignflow.errors import TrainingError


class SRUM(ForwardRecipe):
    """SRUM: flow matching weighted by local scores times the score of the whole image (arXiv 2510.12784)

    The reward gives the regions. The authors train on stored samples of the base. Here the samples are the policy's,
    and the constraint is the plain error of the same samples, since there is no ground truth: both are ours.
    """

    kind: Literal["srum"] = "srum"
    needs = ("regions",)
    signed: bool = Field(
        False, description="use local scores in [-1, 1], which push away from bad regions; false = weights in [0, 1]"
    )
    constraint: float = Field(0.5, ge=0, description="weight of the unweighted flow-matching error")

    @property
    def compares(self) -> bool:
        """Every sample gives a gradient, whatever the others score."""
        return False

    def look(self, sample: Tensor, rollout: Scored, bench: Bench) -> dict[str, Tensor]:
        """The weights of every sample at the size of its latents; 0 if it has no score."""
        reward = bench.scorer
        if reward is None or reward.regions is None:
            raise TrainingError("srum needs a reward with scores of regions, and this one gives none; shapes does")
        rows, (low, high) = sample.cpu(), reward.range
        score = 2 * (rollout.scores.values[rows].nan_to_num(low) - low) / (high - low) - 1
        local = reward.regions(from_bytes(rollout.media[rows]), [rollout.prompts[n] for n in rows.tolist()])
        weight = regions.reward_map(local, score, signed=self.signed)
        return {"regions": regions.at_latents(weight, rollout.latents[sample])}

    def loss(self, terms: NoisedTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """The weighted error of every place."""
        x0, eps, point = self.noised(terms, rollout)
        v, weight = bench.velocity("policy", point), rollout.seen["regions"][terms.sample]
        return self.anchored(regions.region_fm(v, x0, eps, weight, self.constraint), point, bench)

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Needs scored samples of its own."""
        problem = ("rollout.kind", "srum scores regions of samples made in training: use kind 'online'")
        return [] if config.rollout.kind == "online" else [problem]
