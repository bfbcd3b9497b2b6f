"""Preference optimisation on flows: online pairs from a group, or stored pairs from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.config import registry
from align.maths import losses, regions
from align.maths.pairs import Pairs, all_pairs, dominance, top_k_pairs
from align.recipes.base import Bench, ForwardRecipe, Loss, Scored, Tensor, Terms, stratified_times, torch
from alignflow.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class PairTerms(Terms):
    """One pair at one time ``t [M]``: its sample is the winner, ``loser [M]`` the other; ``scores [M, 2]`` theirs."""

    t: Tensor
    loser: Tensor
    scores: Tensor


class FlowDPO(ForwardRecipe):
    """Flow-DPO: prefer the better sample of a pair, shared noise and time, constant beta (arXiv 2501.13918)

    Online, the samples of each group are paired as ``choose`` says. With ``rollout.kind: pairs`` the pairs come from a
    file. ``flow_weight`` adds flow matching on the winner (VLIC, arXiv 2512.15701), ``region: mask`` counts errors in
    the hole of a fill alone (Follow-Your-Preference, 2509.23082).
    """

    renamed: ClassVar = {"refresh": "reference_every"}
    compares_group = True
    kind: Literal["flow_dpo"] = "flow_dpo"
    beta: float = Field(
        500.0, gt=0, description="beta in -log sigmoid(-beta/2 [...]); errors are means over dimensions"
    )
    choose: Literal["best_worst", "all", "dominance"] = Field(
        "best_worst",
        description="which samples of a group are paired: best_worst = best with worst, second best with second "
        "worst | all = every two | dominance = every two of which one is better in all parts of the reward",
    )
    pairs: int = Field(1, ge=1, description="pairs formed from each group by best_worst")
    margin: float = Field(0.0, ge=0, description="minimum reward difference of a pair (exclusive)")
    reference_every: int = Field(
        0, ge=0, description="rollouts between resets of the reference to the policy; 0 = never"
    )
    flow_weight: float = Field(
        0.0, ge=0, description="weight of the winner's flow-matching error, added to the loss; 0 = none"
    )
    region: Literal["all", "mask"] = Field(
        "all", description="errors that count: all | mask = those where the prompt's mask is to be repainted"
    )

    def terms_per_sample(self, config: Any) -> float:
        """One term per pair and noised copy, shared out over the samples of the group."""
        size = config.rollout.group
        count = min(self.pairs, size // 2) if self.choose == "best_worst" else size * (size - 1) / 2
        return self.timesteps * count / size

    def division(self, config: Any) -> tuple[Sequence[int] | None, int]:
        """The winners, which are known before the scores where pairs are stored: a row has one of its own."""
        stored = config.rollout.kind == "pairs"
        return range(0, 2 * config.rollout.prompts, 2) if stored else None, self.timesteps

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Needs two samples of a prompt, and what ``choose`` and ``region`` ask for."""
        found, generator = [], config.generator.kind
        if config.rollout.kind == "samples":
            found.append(("rollout.kind", f"{self.kind} learns from pairs of one prompt: use kind 'online' or 'pairs'"))
        if self.region == "mask" and ":" not in generator and "mask" not in registry.inputs(generator):
            found.append(("recipe.region", f"generator {generator} has no masks: use 'all', or a generator of fills"))
        if self.choose != "best_worst" and config.rollout.kind == "pairs":
            found.append(("recipe.choose", f"{self.choose} pairs samples of a group, and these pairs are in a file"))
        return found

    def rows_per_term(self, config: Any) -> int:
        """Winner and loser."""
        return 2

    def roles(self, config: Any) -> tuple[str, ...]:
        """One reference for the preference: the base, or the policy of the last refresh; the base for the penalty."""
        return tuple(dict.fromkeys(("anchor" if self.reference_every else "reference", *super().roles(config))))

    def wants(self) -> tuple[str, ...]:
        """The mask, where errors outside do not count."""
        return ("mask",) if self.region == "mask" else ()

    def chosen(self, rollout: Scored, credit: Tensor) -> Pairs:
        """The pairs of every group, as many as its size allows."""
        if self.choose == "best_worst":
            return top_k_pairs(credit, rollout.group, self.pairs, margin=self.margin)
        if self.choose == "all":
            return all_pairs(credit, rollout.group, margin=self.margin)
        if len(rollout.scores.parts) < 2:
            raise TrainingError("recipe.choose: dominance needs a reward with two named parts, as a mixture has")
        parts = torch.stack([*rollout.scores.parts.values()], 1).to(credit)
        return dominance(parts.where(credit.isfinite()[:, None], torch.nan), rollout.group, margin=self.margin)

    def terms(self, rollout: Scored, credit: Tensor) -> Terms:
        """Every pair, of one group and so of one process, at stratified times; the term's sample is the winner."""
        chosen = self.chosen(rollout, credit)
        rows, slot = torch.cartesian_prod(torch.arange(len(chosen)), torch.arange(self.timesteps)).unbind(1)
        t = stratified_times([rollout.seeds[i] for i in chosen.winner], self.timesteps, self.t_range).flatten()
        won, lost, weight = chosen.winner[rows], chosen.loser[rows], chosen.valid.float()[rows]
        scores = credit[torch.stack([won, lost], 1)].where(weight[:, None] > 0, 0.0)  # a missing score is NaN
        return PairTerms(sample=won, slot=slot, weight=weight, t=t, loser=lost, scores=scores)

    def preference(self, scores: Tensor) -> dict[str, Any]:
        """Keyword arguments of :func:`~align.maths.losses.pair_pref` for the scores ``[M, 2]`` of the pairs."""
        return {"beta": self.beta}

    def loss(self, terms: PairTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        """``-log sigmoid`` of how much more the policy favours the winner than the reference does."""
        x0 = rollout.latents
        both = torch.cat([terms.sample, terms.loser])
        eps = rollout.noise(terms.sample, terms.slot).repeat(2, *[1] * (x0.ndim - 1))
        t = terms.t.to(x0.device).repeat(2)
        point = self.point(losses.x_at(x0[both], eps, t), t, both, rollout)
        before = "anchor" if self.reference_every else "reference"
        v, v_ref = bench.velocity("policy", point), bench.velocity(before, point)
        area = regions.at_latents(rollout.inputs["mask"][both], x0) if self.region == "mask" else None
        (won, lost), (ref_won, ref_lost) = (losses.mse(u, eps - x0[both], area).chunk(2) for u in (v, v_ref))
        loss = losses.pair_pref(won, lost, ref_won, ref_lost, **self.preference(terms.scores.to(v.device)))
        if self.flow_weight:
            error = self.to_imitate(terms, rollout, won, lost)
            loss = losses.Loss(loss.value + self.flow_weight * error, {**loss.metrics, "fm": error.detach()})
        if not self.kl:
            return loss
        drift = losses.mse(v, bench.velocity("reference", point)).chunk(2)
        return losses.Loss(loss.value + self.kl * (drift[0] + drift[1]) / 2, loss.metrics)

    def to_imitate(self, terms: PairTerms, rollout: Scored, won: Tensor, lost: Tensor) -> Tensor:
        """Errors ``[M]`` of the samples that flow matching imitates, from those of the winners and of the losers."""
        return won

    def decay(self, role: str, step: int) -> float:
        """The anchor stands still between refreshes."""
        return 1.0 if role == "anchor" and step % self.reference_every else 0.0
