"""What a scored rollout teaches: credit, the recipe's look, and the optimizer steps of every learner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.maths.filters import uninformative
from align.recipes.base import ScoredLoss
from align.rollout.bench import Bench
from align.rollout.rollout import Drawn, Scored
from align.training.learner import Learner
from align.training.processes import Processes
from rewards.base import Scores
from rewards.serving.dispatch import Part, joined

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.maths.losses import Loss
    from align.recipes.base import Recipe, Terms

LOST = "lost"


class Learning:
    """The updates of a rollout. Every method must be called by every process.

    Args:
        learners: name -> learner, in the order of their updates.
    """

    def __init__(self, config: Config, learners: Mapping[str, Learner], bench: Bench, processes: Processes) -> None:
        self.recipe: Recipe = config.recipe
        self.learners, self.bench, self.processes = dict(learners), bench, processes
        self.chunk, self.filter = config.train.micro_batch, getattr(config.rollout, "filter", None)
        self.found: list[tuple[Tensor, Scores, Tensor]] = []

    def filtered(self, rollout: Scored) -> tuple[Scored, list[int]]:
        """The rollout with its void groups marked, and the numbers of all processes' void groups."""
        if self.filter is None:
            return rollout, []
        group = self.processes.gather(rollout.group)
        void = uninformative(
            self.processes.gather(rollout.scores.values), group, self.filter.mean_above, self.filter.std_below
        )
        numbers = group[void].unique()
        return rollout.become(Scored, void=torch.isin(rollout.group, numbers)), numbers.tolist()

    def __call__(self, rollout: Scored) -> tuple[dict[str, Any], Scored]:
        """All updates of a rollout: the row for the log, and the rollout with the scores and media of its loss, if any.

        Numbers of the row are means over the updates of each learner; names of a learner other than the policy begin
        with its name and a slash.
        """
        count = len(rollout.seeds)
        before = sum(self.processes.objects([count])[: self.processes.share.rank])
        credit = self._credit(rollout)[before : before + count]
        if rollout.seeds:
            rollout = rollout.become(Scored, seen=self._look(rollout))
        row: dict[str, Any] = {}
        self.found = []
        for name, learner in self.learners.items():
            terms = learner.objective.terms(rollout, credit) if rollout.seeds else None
            rows = [
                self._update(learner, _part(terms, before, number, learner.updates), rollout)
                for number in range(learner.updates)
            ]
            prefix = "" if name == "policy" else f"{name}/"
            row |= {f"{prefix}{key}": value for key, value in _averaged(rows).items()}
        return row, _completed(rollout, self.found)

    def _credit(self, rollout: Scored) -> Tensor:
        """Credit of the samples of all processes, in the order of the processes."""
        gather = self.processes.gather
        scores = self.processes.gather_scores(rollout.scores)
        if rollout.void is not None:
            values = scores.values.masked_fill(gather(rollout.void), math.nan)
            scores = Scores(values, scores.reasons, scores.parts, scores.steps)
        return self.recipe.credit(scores, gather(rollout.group))

    @torch.no_grad()
    def _look(self, rollout: Scored) -> dict[str, Tensor]:
        chunks = torch.arange(len(rollout.seeds)).split(self.chunk)
        found = [self.recipe.look(sample, rollout, self.bench) for sample in chunks]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def _update(self, learner: Learner, terms: Terms | None, rollout: Drawn) -> dict[str, float]:
        """One optimizer step on this process's terms, None or empty where it has none."""
        weights = torch.zeros(0) if terms is None else terms.weight
        total = self.processes.sums({"weight": float(weights.sum())})["weight"]
        if total == 0:
            return {"loss": math.nan}
        sums, first = self.processes.together(lambda: self._gradients(learner, terms, rollout, total))
        metrics = self.processes.sums(sums)
        lost = metrics.pop(LOST)
        if lost >= total:
            learner.stepper.optimizer.zero_grad()
            return {"loss": math.nan}
        if lost:
            share = total / (total - lost)
            learner.stepper.scale(share)
            metrics = {name: value * share for name, value in metrics.items()}
        metrics |= {"ratio": first.pop("ratio")} if "ratio" in first else {}
        return {**first, **metrics, **learner.step()}

    def _gradients(
        self, learner: Learner, terms: Terms | None, rollout: Drawn, total: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Add up the gradients of ``weight * loss / total`` of this process's terms, chunk by chunk.

        Returns:
            the sums of the metrics and, as :data:`LOST`, the weight of terms without a score; and the diagnostics of
            the first chunk.
        """
        sums: dict[str, Tensor] = {}
        first: dict[str, float] = {}
        lost, place = 0.0, 0
        for weight in terms.weight.split(self.chunk) if terms is not None and len(terms) else []:
            assert terms is not None
            chunk = terms[place : place + len(weight)]
            with self.bench.acting(learner.name):
                loss = learner.objective.loss(chunk, rollout, self.bench)  # type: ignore[arg-type]
                known = self._known(chunk, loss)
                scale = (weight * known).to(loss.value.device) / total
                if known.any():
                    self.processes.accelerator.backward((loss.value * scale).sum())
                if place == 0:
                    first = self.bench.drifts()
            for name, values in {"loss": loss.value.detach(), **loss.metrics}.items():
                part = (values.detach() * scale).sum()
                sums[name] = sums.get(name, torch.zeros_like(part)) + part
            if place == 0 and (ratio := loss.metrics.get("ratio")) is not None:
                first["ratio"] = float(ratio.mean())
            place += len(weight)
            lost += float((weight * ~known).sum())
        return {name: float(value) for name, value in sums.items()} | {LOST: lost}, first

    def _known(self, terms: Terms, loss: Loss) -> Tensor:
        """``[M]`` which terms have a score; all of them where the loss did not score."""
        if not isinstance(loss, ScoredLoss):
            return torch.ones(len(terms), dtype=torch.bool)
        self.found.append((terms.sample, loss.scores, loss.media))
        return loss.scores.values.isfinite().cpu()


def _completed(rollout: Scored, found: list[tuple[Tensor, Scores, Tensor]]) -> Scored:
    """The rollout with the scores and media that losses found of its samples."""
    if not found:
        return rollout
    parts = [Part(sample.tolist(), media, [], None, {}) for sample, _, media in found]
    media = torch.cat([part.media for part in parts])[torch.cat([sample for sample, _, _ in found]).argsort()]
    return rollout.become(Scored, media=media, scores=joined(parts, [scores for _, scores, _ in found]))


def _part(terms: Terms | None, before: int, number: int, updates: int) -> Terms | None:
    """The terms of update ``number``; a sample's terms are spread over the updates.

    Args:
        before: samples of the processes before this one, so that the parts do not depend on their number.
    """
    if terms is None:
        return None
    return terms[((terms.slot + terms.sample + before) % updates == number).nonzero().flatten()]


def _averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the updates; the ratio is the first update's."""
    first = rows[0]
    averaged = {name: sum(row.get(name, math.nan) for row in rows) / len(rows) for name in first}
    return averaged | {name: first[name] for name in ("ratio",) if name in first}
