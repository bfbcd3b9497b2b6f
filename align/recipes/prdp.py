"""Reward difference prediction: log-ratios to the reference regress onto reward differences within a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from align.maths import losses, pairs
from align.recipes.base import Bench, GroupRecipe, Loss, Scored, Scores, Tensor, Terms, torch


@dataclass(frozen=True, kw_only=True)
class RewardPairs(Terms):
    """One pair of samples at all steps: the better one, ``loser [M]``, and their difference in credit, ``gap [M]``."""

    loser: Tensor
    gap: Tensor


class PRDP(GroupRecipe):
    """PRDP: the log-ratios of two samples of a prompt predict their reward difference (arXiv 2402.08714)

    The loss is 0 if the policy is ``reference * exp(credit D / beta) / Z``, for log-probabilities averaged over the
    D dimensions of a latent. A term is a pair with its S stochastic steps: ``2 S`` rows of the network call.
    """

    needs = ("trajectory",)
    kind: Literal["prdp"] = "prdp"
    beta: float = Field(
        500.0, gt=0, description="target of a pair's log-ratios: advantage difference / beta (averaged over D "
        "dimensions, so that beta / D is the weight of the KL); larger values stay closer to the reference",
    )  # fmt: skip
    ratio_clip: float | None = Field(
        1e-4, gt=0, description="trust region: maximum change of a step's log-ratio; null = no limit"
    )
    reduce: Literal["sum", "mean"] = Field(
        "sum", description="log-ratio of a sample: sum or mean (published) over steps"
    )
    pairs: int | None = Field(4, ge=1, description="pairs per group, best with worst first; null = every two samples")
    passes: int = Field(1, ge=1, description="updates of a rollout that use each pair; at most train.updates")

    @property
    def compares_logp(self) -> bool:
        """The trust region does."""
        return self.ratio_clip is not None

    def check(self, config: Any) -> list[tuple[str, str]]:
        """More passes than updates would repeat a pair within an update."""
        most = config.train.updates
        return [("recipe.passes", f"should be at most train.updates, {most}")] if self.passes > most else []

    def roles(self, config: Any) -> tuple[str, ...]:
        """The reference of the log-ratios."""
        return ("reference",)

    def terms_per_sample(self, config: Any) -> float:
        """One term per pair and pass, shared out over the samples of the group."""
        size = config.rollout.group
        return self.passes * ((size - 1) / 2 if self.pairs is None else min(self.pairs, size // 2) / size)

    def division(self, config: Any) -> tuple[Sequence[int] | None, int]:
        """The winners, which follow from the scores."""
        return None, self.passes

    def rows_per_term(self, config: Any) -> int:
        """Both samples at every stochastic step."""
        return 2 * config.rollout.sampler.stochastic_count

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Advantages ``[N]``, NaN for a missing score, which is in no pair."""
        return self.advantage(scores, group, None).where(scores.values.isfinite(), torch.nan)

    def look(self, sample: Tensor, rollout: Scored, bench: Bench) -> dict[str, Tensor]:
        """``logp_ref [M, S]``: log-probabilities of the reference, one step at a time to save memory."""
        steps = [torch.full_like(sample, s) for s in range(len(rollout.path.t))]
        return {"logp_ref": torch.stack([bench.steps(rollout, sample, s)("reference").logp for s in steps], 1)}

    def terms(self, rollout: Scored, credit: Tensor) -> Terms:
        """Every pair ``passes`` times. Ties stay: their log-ratios should be equal."""
        group, k = rollout.group, self.pairs
        found = pairs.top_k_pairs(credit, group, k, -1.0) if k else pairs.all_pairs(credit, group, -1.0)
        slot, row = torch.cartesian_prod(torch.arange(self.passes), torch.arange(len(found))).unbind(1)
        sample, loser, gap, weight = (x[row] for x in (found.winner, found.loser, found.gap, found.valid.float()))
        return RewardPairs(sample=sample, slot=slot, weight=weight, loser=loser, gap=gap)

    def loss(self, terms: RewardPairs, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """Squared error of the predicted reward difference, in the trust region of the policy that sampled.

        Times beta: far from the target the gradient, ``-2 gap``, then has the same size for all beta.
        """
        old, ref = rollout.path.logp, rollout.seen["logp_ref"]
        both, steps = torch.cat([terms.sample, terms.loser]), old.shape[1]
        slot = torch.arange(steps).repeat(len(both))
        new = bench.steps(rollout, both.repeat_interleave(steps), slot)("policy").logp.unflatten(0, (-1, steps))
        (a, b), (old_a, old_b) = ((logp - ref[both]).chunk(2) for logp in (new, old[both]))
        gap = terms.gap.to(a.device)
        loss = losses.rdp(a, b, gap, self.beta, old_a=old_a, old_b=old_b, clip=self.ratio_clip, reduce=self.reduce)
        return losses.Loss(self.beta * loss.value, loss.metrics)
