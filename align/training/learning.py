"""Learning from a scored rollout: credit, the recipe's look, and the optimizer steps of every learner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.data.media import to_bytes
from align.maths.filters import most_spread, uninformative
from align.recipes import base as bases
from align.rollout.bench import Bench
from align.rollout.rollout import Scored
from align.runs.processes import Processes
from align.training import truth
from align.training.learner import Learner
from align.training.sharding import borrowed
from rewards.base import Scores
from rewards.parts import Part, joined

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.maths.losses import Loss
    from align.recipes.base import Recipe, Terms

    Work = tuple[Terms, Scored]
    """Terms of one call of the loss, and their rollout."""

LOST = "lost"


class Learning:
    """The updates of a rollout. Every method must be called by every process.

    Args:
        learners: name -> learner, in the order of their updates.
    """

    def __init__(self, config: Config, learners: Mapping[str, Learner], bench: Bench, processes: Processes) -> None:
        self.settings: Recipe = config.recipe
        self.recipe = self.settings
        self.learners, self.bench, self.processes = dict(learners), bench, processes
        self.chunk, self.filter = config.train.chunk, getattr(config.rollout, "filter", None)
        self.found: list[tuple[Tensor, Scores, Tensor]] = []
        self.recompute = getattr(config.rollout, "recompute", False)
        self.keep: int | None = getattr(config.rollout, "keep", None)
        self.unit = config.rollout.group if config.rollout.kind == "pairs" else 1
        self.ratios: list[Tensor] | None = None
        """Ratios of the run's first update while it is made."""
        self.gaps: dict[str, float] = {}
        self.counted: Callable[[int, int], None] | None = None
        """Is called with the number of terms that this process is through with, and of all, of the learner in turn."""
        self.through = self.terms = 0

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

    def __call__(self, step: int, rollout: Scored) -> tuple[dict[str, Any], Scored]:
        """All updates of rollout ``step`` (from 0): the row for the log, and the rollout with the scores and media of
        its loss, if any.

        Numbers of the row are means over the updates of each learner; names of a learner other than the policy begin
        with its name and a slash.
        """
        self.recipe = self.settings.at(step)
        objectives = {name: learns.objective for name, learns in self.recipe.learners().items()}
        count = len(rollout.seeds)
        before = sum(self.processes.objects([count])[: self.processes.share.rank])
        mine = slice(before, before + count)
        credit, kept = self._credit(rollout)[mine], self._kept(rollout)
        if seen := self._look(rollout, credit):
            rollout = rollout.become(Scored, seen=seen)
        row: dict[str, Any] = {}
        self.found, self.ratios = [], [] if step == 0 and "trajectory" in self.recipe.needs else None
        for name, one in self.learners.items():
            if not one.updates:
                continue
            learner = replace(one, objective=objectives[name])
            terms = learner.objective.terms(rollout, credit) if rollout.seeds else None
            if kept is not None and name == "policy" and terms is not None:
                terms = terms[kept[mine][terms.sample]]
            spare = self._spare(learner, terms, rollout, credit)
            self.through, self.terms = 0, 0 if terms is None else len(terms)
            if name == "policy" and self.recompute:
                parts = [self._part(terms, before, number, learner.updates) for number in range(learner.updates)]
                work = [piece for part in parts for piece in self._work(part, rollout, spare)]
                rollout = truth.recomputed(learner.objective, work, rollout, self.bench)  # type: ignore[arg-type]
            rows = [
                self._update(learner, self._part(terms, before, number, learner.updates), rollout, spare)
                for number in range(learner.updates)
            ]
            prefix = "" if name == "policy" else f"{name}/"
            row |= {f"{prefix}{key}": value for key, value in _averaged(rows).items()}
        row, self.gaps = row | self.gaps, {}
        return row, _completed(rollout, self.found)

    def _credit(self, rollout: Scored) -> Tensor:
        """Credit of the samples of all processes, in the order of the processes."""
        gather = self.processes.gather
        scores = self.processes.gather_scores(rollout.scores)
        if rollout.void is not None:
            values = scores.values.masked_fill(gather(rollout.void), math.nan)
            scores = Scores(values, scores.reasons, scores.parts, scores.steps)
        return self.recipe.seeded_credit(scores, gather(rollout.group), rollout.seed)

    def _kept(self, rollout: Scored) -> Tensor | None:
        """Samples of all processes that the policy is trained on, in the order of the processes; None for all."""
        if self.keep is None:
            return None
        gather = self.processes.gather
        values = gather(rollout.scores.values)
        values = values if rollout.void is None else values.masked_fill(gather(rollout.void), math.nan)
        return most_spread(values, gather(rollout.group), self.keep)

    @torch.no_grad()
    def _look(self, rollout: Scored, credit: Tensor) -> dict[str, Tensor]:
        """Result of the recipe's ``look`` before the updates; empty for a process without samples."""
        if type(self.recipe).look is bases.Recipe.look:
            return {}
        count, source = len(rollout.seeds), rollout
        chunks = [rows for rows in torch.arange(count).split(self.chunk) if len(rows)]
        if self.processes.sharded:
            lent = borrowed(self.processes, rollout, credit, 0 if count else None)
            source = lent[0] if lent else rollout
            chunks += [torch.zeros(1, dtype=torch.long)] * (self._most(len(chunks)) - len(chunks))
        found = [self.recipe.look(rows, source, self.bench) for rows in chunks]
        return {name: torch.cat([one[name] for one in found])[:count] for name in found[0]} if count else {}

    def _most(self, count: int) -> int:
        return max(self.processes.objects([count]))

    def _spare(self, learner: Learner, terms: Terms | None, rollout: Scored, credit: Tensor) -> Work | None:
        """A term of weight 0, for chunks that a process lacks where networks are sharded; None where nobody has any."""
        if not self.processes.sharded:
            return None
        mine = int(terms.sample[0]) if terms is not None and len(terms) else None
        if lent := borrowed(self.processes, rollout, credit, mine):
            rollout, credit = lent
            terms = learner.objective.terms(rollout, credit)
        if terms is None or not len(terms):
            return None
        return replace(terms[:1], weight=torch.zeros(1)), rollout

    def _work(self, terms: Terms | None, rollout: Scored, spare: Work | None) -> list[Work]:
        """The chunks of this process; where networks are sharded, as many in every process."""
        rows = torch.arange(0 if terms is None else len(terms)).split(self.chunk)
        work: list[Work] = [(terms[some], rollout) for some in rows if len(some)] if terms is not None else []
        if self.processes.sharded and spare is not None:
            work += [spare] * (self._most(len(work)) - len(work))
        return work

    def _update(self, learner: Learner, terms: Terms | None, rollout: Scored, spare: Work | None) -> dict[str, float]:
        """One optimizer step on this process's terms, None or empty if it has none."""
        weight = 0.0 if terms is None else float(terms.weight.sum())
        total = self.processes.sums({"weight": weight})["weight"]
        if total == 0:
            return {"loss": math.nan}
        sums, first = self.processes.together(lambda: self._gradients(learner, terms, rollout, total, spare))
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
        if self.ratios is not None and learner.name == "policy":
            mine = torch.cat(self.ratios) if self.ratios else torch.empty(0)
            self.ratios, everyone = None, self.processes.gather(mine.cpu())
            self.gaps = truth.gaps(everyone) if len(everyone) else {}
        return {**first, **metrics, **learner.step()}

    def _gradients(
        self, learner: Learner, terms: Terms | None, rollout: Scored, total: float, spare: Work | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Add up the gradients of ``weight * loss / total`` of this process's terms, chunk by chunk.

        Returns:
            the sums of the metrics and, as :data:`LOST`, the weight of terms without a score; and the diagnostics of
            the first chunk.
        """
        sums: dict[str, Tensor] = {}
        first: dict[str, float] = {}
        lost = 0.0
        for number, (some, source) in enumerate(self._work(terms, rollout, spare)):
            mine = spare is None or some is not spare[0]
            if self.counted is not None:
                self.counted(self.through, self.terms)
            self.through += len(some) if mine else 0
            with self.bench.acting(learner.name):
                loss = learner.objective.loss(some, source, self.bench)
                known = self._known(some, loss, mine)
                scale = (some.weight * known).to(loss.value.device) / total
                if known.any() or self.processes.sharded:
                    self.processes.accelerator.backward((loss.value * scale).sum())
                drifts = self.bench.drifts() if number == 0 else {}
            if not mine:
                continue
            first |= drifts
            lost += float((some.weight * ~known).sum())
            for name, values in {"loss": loss.value.detach(), **loss.metrics}.items():
                part = (values.detach() * scale).sum()
                sums[name] = sums.get(name, torch.zeros_like(part)) + part
            if (ratio := loss.metrics.get("ratio")) is not None:
                if number == 0:
                    first["ratio"] = float(ratio.mean())
                if self.ratios is not None and learner.name == "policy":
                    self.ratios.append(ratio.float())
        return {name: float(value) for name, value in sums.items()} | {LOST: lost}, first

    def _part(self, terms: Terms | None, before: int, number: int, updates: int) -> Terms | None:
        """The terms of update ``number``; the terms of a sample, or of a stored pair, are spread over the updates.

        A stored pair counts as one: its winner stands at an even place, so that two updates divided by samples would
        leave one of them without terms where a pair has one term.

        Args:
            before: samples of the processes before this one, so that the parts do not depend on their number.
        """
        if terms is None:
            return None
        place = terms.slot + (terms.sample + before) // self.unit
        return terms[(place % updates == number).nonzero().flatten()]

    def _known(self, terms: Terms, loss: Loss, mine: bool) -> Tensor:
        """``[M]`` which terms have a score; all of them where the loss did not score."""
        if not isinstance(loss, bases.ScoredLoss):
            return torch.ones(len(terms), dtype=torch.bool)
        if mine:
            self.found.append((terms.sample, loss.scores, loss.media))
        return loss.scores.values.isfinite().cpu()


def _completed(rollout: Scored, found: list[tuple[Tensor, Scores, Tensor]]) -> Scored:
    """The rollout with the scores and media that losses found of its samples."""
    if not found:
        return rollout
    parts = [Part(sample.tolist(), to_bytes(media).cpu(), [], None, {}) for sample, _, media in found]
    media = torch.cat([part.media for part in parts])[torch.cat([sample for sample, _, _ in found]).argsort()]
    return rollout.become(Scored, media=media, scores=joined(parts, [scores for _, scores, _ in found]))


def _averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the updates; the ratio is the first update's."""
    first = rows[0]
    averaged = {name: sum(row.get(name, math.nan) for row in rows) / len(rows) for name in first}
    return averaged | {name: first[name] for name in ("ratio",) if name in first}
