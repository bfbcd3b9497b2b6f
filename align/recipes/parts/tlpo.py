"""A gate over expert LoRAs, one per preference dimension, trained with pairs that all dimensions agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from align.recipes.base import Bench, Loss, Scored
from align.recipes.flow_dpo import FlowDPO, PairTerms
from alignflow.lazy import lazy

if TYPE_CHECKING:
    from align.policy import gated
else:
    gated = lazy("align.policy.gated")


class TLPO(FlowDPO):
    """TLPO: a gate per block and time mixes expert LoRAs, one per preference dimension (FantasyTalking2, 2508.11255)

    The experts come from runs of ``flow_dpo``, each with a reward or a ``rollout.dimension`` of its own. They are
    frozen; ``policy: {kind: gate}`` names them, and this trains the gate with the loss of ``flow_dpo``, on pairs whose
    winner is better in all parts of the reward. The paper does not publish the gate; see :mod:`align.policy.gated` for
    our reconstruction. The reference is the base without experts.
    """

    kind: Literal["tlpo"] = "tlpo"  # type: ignore[assignment]
    choose: Literal["best_worst", "all", "dominance"] = Field(
        "dominance", description="which samples of a group are paired, as for flow_dpo; best_worst for pairs of a file"
    )

    def check(self, config: Any) -> list[tuple[str, str]]:
        """A gate is trained, and the pairs of a group are those of several parts."""
        found = super().check(config)
        if config.policy.kind != "gate":
            found.append(("policy.kind", "tlpo trains a gate over expert LoRAs: use gate, with experts"))
        return found

    def loss(self, terms: PairTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """The loss of ``flow_dpo``, and the experts' shares, averaged over blocks, for the log."""
        loss = super().loss(terms, rollout, bench)
        share = gated.shares(bench.generator, terms.t.to(loss.value.device)).mean(0)
        chosen = {f"share/{name}": share[:, k] for k, name in enumerate(gated.names(bench.generator))}
        return Loss(loss.value, {**loss.metrics, **chosen, "share/largest": share.amax(1)})
