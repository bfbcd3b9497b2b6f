"""What a scored rollout teaches: credit, the recipe's look, and the optimizer steps of every learner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.maths.filters import uninformative
from align.rollout.bench import Bench
from align.rollout.rollout import Drawn, Scored
from align.training.learner import Learner
from align.training.processes import Processes
from rewards.base import Scores

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.recipes.base import Recipe, Terms


class Learning:
    """The updates of a rollout. Every method must be called by every process.

    Args:
        learners: name -> learner, in the order of their updates.
    """

    def __init__(self, config: Config, learners: Mapping[str, Learner], bench: Bench, processes: Processes) -> None:
        self.recipe: Recipe = config.recipe
        self.learners, self.bench, self.processes = dict(learners), bench, processes
        self.chunk, self.filter = config.train.micro_batch, getattr(config.rollout, "filter", None)

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

    def __call__(self, rollout: Scored) -> dict[str, Any]:
        """All updates of a rollout; the row for the log: means over the updates of each learner.

        Names of a learner other than the policy begin with its name and a slash.
        """
        credit = self._credit(rollout)
        if rollout.seeds:
            rollout = rollout.become(Scored, seen=self._look(rollout))
        row: dict[str, Any] = {}
        for name, learner in self.learners.items():
            terms = learner.objective.terms(rollout, credit) if rollout.seeds else None
            rows = [self._update(learner, _part(terms, number, learner.updates), rollout) for number in
                    range(learner.updates)]  # fmt: skip
            prefix = "" if name == "policy" else f"{name}/"
            row |= {f"{prefix}{key}": value for key, value in _averaged(rows).items()}
        return row

    def _credit(self, rollout: Scored) -> Tensor:
        """This process's rows of the credit, which is assigned to the samples of all processes."""
        gather = self.processes.gather
        scores = self.processes.gather_scores(rollout.scores)
        if rollout.void is not None:
            values = scores.values.masked_fill(gather(rollout.void), math.nan)
            scores = Scores(values, scores.reasons, scores.parts, scores.steps)
        everyone = self.recipe.credit(scores, gather(rollout.group))
        before = sum(self.processes.objects([len(rollout.seeds)])[: self.processes.share.rank])
        return everyone[before : before + len(rollout.seeds)]

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
        sums: dict[str, Tensor] = {}
        first: dict[str, float] = {}
        place = 0
        for weight in weights.split(self.chunk) if len(weights) else []:
            assert terms is not None
            with self.bench.acting(learner.name):
                loss = learner.objective.loss(terms[place : place + len(weight)], rollout, self.bench)  # type: ignore[arg-type]
                scale = weight.to(loss.value.device) / total
                self.processes.accelerator.backward((loss.value * scale).sum())
                if place == 0:
                    first = self.bench.drifts()
            for name, values in {"loss": loss.value.detach(), **loss.metrics}.items():
                part = (values.detach() * scale).sum()
                sums[name] = sums.get(name, torch.zeros_like(part)) + part
            if place == 0 and (ratio := loss.metrics.get("ratio")) is not None:
                first["ratio"] = float(ratio.mean())
            place += len(weight)
        metrics = self.processes.sums({name: float(value) for name, value in sums.items()})
        metrics |= {"ratio": first.pop("ratio")} if "ratio" in first else {}
        return {**first, **metrics, **learner.step()}


def _part(terms: Terms | None, number: int, updates: int) -> Terms | None:
    """The terms of update ``number``; a sample's terms are spread over the updates."""
    if terms is None:
        return None
    return terms[((terms.slot + terms.sample) % updates == number).nonzero().flatten()]


def _averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the updates; the ratio is the first update's."""
    first = rows[0]
    averaged = {name: sum(row.get(name, math.nan) for row in rows) / len(rows) for name in first}
    return averaged | {name: first[name] for name in ("ratio",) if name in first}
