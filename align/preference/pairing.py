"""Scored samples -> preference pairs by a policy, as in ``alignflow pairs``. No media is opened here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from align.maths import pairs
from alignflow.errors import ConfigError, DataError
from alignflow.lazy import lazy
from alignflow.words import listing

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Row = Mapping[str, Any]
"""A scored sample: ``group`` (number of its prompt), ``score`` and ``parts {name: score}``, None where missing."""


@dataclass(frozen=True)
class Pairing:
    """Settings for forming pairs.

    Args:
        policy: one of :data:`POLICIES`.
        by: names of the scores that decide; empty = the reward, or all rewards or parts where a policy takes several.
        per_prompt: pairs of a prompt at most, those with the largest gaps; None = all, of best_worst and pass_fail one.
        margin: the gap of a pair has to be larger.
        above: name -> threshold that the winner's score of this name has to exceed (threshold_gap).
        top: ranks of a prompt that may win (threshold_gap), samples that are references (best_of_n_reference).
        passing: score from which a sample passes (pass_fail).
        seed: random seed of the choice of partners (pass_fail).
    """

    policy: str = "best_worst"
    by: tuple[str, ...] = ()
    per_prompt: int | None = None
    margin: float = 0.0
    above: Mapping[str, float] = field(default_factory=dict)
    top: int = 2
    passing: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for options that the policy does not have or cannot do without."""
        if self.policy not in POLICIES:
            raise ConfigError(f"--policy {self.policy}: no such policy; there are {listing(POLICIES)}")
        if self.above and self.policy != "threshold_gap":
            raise ConfigError(f"--above belongs to --policy threshold_gap, not to {self.policy}")
        if (self.passing is None) == (self.policy == "pass_fail"):
            said = "needs --passing SCORE" if self.passing is None else "has no use for --passing"
            raise ConfigError(f"--policy {self.policy} {said}")
        if self.policy in PLAIN and len(self.by) > 1:
            raise ConfigError(f"--policy {self.policy} decides by one score; --by is given {len(self.by)} times")


@dataclass(frozen=True)
class Formed:
    """Pairs of rows.

    Args:
        winner: row number of each winner, ``loser`` of the other one.
        tie: whether neither is better (pass_fail alone).
        score: name of the score that ``chosen_score`` and ``rejected_score`` are; "" = the reward's.
        unpaired: why prompts have no pair -> how many.
    """

    winner: list[int]
    loser: list[int]
    tie: list[bool]
    score: str
    unpaired: dict[str, int]


class Scores:
    """The scores of N rows as float64 columns; NaN where missing."""

    def __init__(self, rows: Sequence[Row], pairing: Pairing) -> None:
        self.rows, self.pairing = rows, pairing
        self.group = torch.tensor([row["group"] for row in rows], dtype=torch.long)
        self.names = list(dict.fromkeys(name for row in rows for name in row["parts"]))

    def column(self, name: str) -> Tensor:
        """``[N]`` the reward's score ("") or that of a part; DataError for a name that no sample has."""
        if name and name not in self.names:
            known = listing(self.names) if self.names else "no parts"
            raise DataError(f"no score has the name {name!r}; besides the reward there are {known}")
        found = [row["parts"].get(name) if name else row["score"] for row in self.rows]
        return torch.tensor([math.nan if value is None else value for value in found], dtype=torch.float64)

    @property
    def judges(self) -> tuple[str, ...]:
        """Names of the scores that decide together: those given, or all parts."""
        return self.pairing.by or tuple(self.names)

    def two(self) -> tuple[Tensor, Tensor]:
        """The scores of two judges; ConfigError if there are not two."""
        if len(self.judges) != 2:
            has = listing(self.judges) if self.judges else "one reward without parts"
            raise ConfigError(
                f"--policy {self.pairing.policy} compares two judges, and there are {has}: give two --reward, or name "
                "two scores with --by"
            )
        return self.column(self.judges[0]), self.column(self.judges[1])

    def parts(self) -> Tensor:
        """``[N, K]``; ConfigError if there is one score alone."""
        if len(self.judges) < 2:
            raise ConfigError("--policy dominance needs two scores at least: several --reward, or a reward with parts")
        return torch.stack([self.column(name) for name in self.judges], 1)

    @property
    def deciding(self) -> str:
        """Name of the score whose gap a pair has."""
        if self.pairing.policy == "rank_then_sift":
            return self.judges[1]
        return self.pairing.by[0] if self.pairing.by else ""

    def passed(self) -> Tensor:
        """``[N]`` bool, whether all thresholds are exceeded; a missing score exceeds none."""
        passed = torch.ones(len(self.rows), dtype=torch.bool)
        for name, threshold in self.pairing.above.items():
            passed &= self.column(name) > threshold
        return passed


def _best_worst(scores: Scores, how: Pairing) -> pairs.Pairs:
    return pairs.top_k_pairs(scores.column(scores.deciding), scores.group, how.per_prompt or 1, how.margin)


def _all(scores: Scores, how: Pairing) -> pairs.Pairs:
    return pairs.all_pairs(scores.column(scores.deciding), scores.group, how.margin)


def _rank_then_sift(scores: Scores, how: Pairing) -> pairs.Pairs:
    return pairs.rank_then_sift(*scores.two(), scores.group, how.margin)


def _agree(scores: Scores, how: Pairing) -> pairs.Pairs:
    return pairs.agree(*scores.two(), scores.group, how.margin)


def _threshold_gap(scores: Scores, how: Pairing) -> pairs.Pairs:
    return pairs.threshold_gap(
        scores.column(scores.deciding), scores.passed(), scores.group, how.margin, how.top
    )  # fmt: skip


def _dominance(scores: Scores, how: Pairing) -> pairs.Pairs:
    return pairs.dominance(scores.parts(), scores.group, how.margin)


def _best_of_n(scores: Scores, how: Pairing) -> pairs.Pairs:
    return pairs.best_of_n_reference(scores.column(scores.deciding), scores.group, how.top, how.margin)


def _pass_fail(scores: Scores, how: Pairing) -> pairs.Pairs:
    assert how.passing is not None
    values = scores.column(scores.deciding)
    return pairs.pass_fail(values, scores.group, how.passing, how.per_prompt or 1, how.seed)


POLICIES: dict[str, Callable[[Scores, Pairing], pairs.Pairs]] = {
    "best_worst": _best_worst,
    "all": _all,
    "rank_then_sift": _rank_then_sift,
    "agree": _agree,
    "threshold_gap": _threshold_gap,
    "dominance": _dominance,
    "pass_fail": _pass_fail,
    "best_of_n_reference": _best_of_n,
}
PLAIN = ("best_worst", "all", "threshold_gap", "pass_fail", "best_of_n_reference")
"""Policies that decide by one score."""


def form(rows: Sequence[Row], how: Pairing) -> Formed:
    """The pairs of scored samples. A winner always has the higher deciding score, except in a tie.

    Raises:
        ConfigError: the policy needs scores that the rows do not have, see :meth:`Pairing.check`.
        DataError: no such score.
    """
    how.check()
    scores = Scores(rows, how)
    found = POLICIES[how.policy](scores, how)
    values = scores.column(scores.deciding)
    tie = torch.zeros_like(found.valid) if found.tie is None else found.tie
    found = replace(found, valid=found.valid & (tie | (values[found.winner] > values[found.loser])))
    if how.per_prompt is not None and how.policy not in ("best_worst", "pass_fail"):
        found = pairs.widest(found, scores.group, how.per_prompt)
    kept = found.valid.nonzero().flatten()
    winner, loser = found.winner[kept].tolist(), found.loser[kept].tolist()
    return Formed(winner, loser, tie[kept].tolist(), scores.deciding, _unpaired(values, scores.group, winner, loser))


def _unpaired(values: Tensor, group: Tensor, winner: Sequence[int], loser: Sequence[int]) -> dict[str, int]:
    """Reasons why prompts have no pair -> number of prompts."""
    paired = set(group[[*winner, *loser]].tolist()) if winner else set()
    counts: dict[str, int] = {}
    for number in sorted(set(group.tolist()) - paired):
        known = values[(group == number) & values.isfinite()]
        few, equal = len(known) < 2, len(known.unique()) < 2
        why = "fewer than two scored samples" if few else "equal scores" if equal else "no pair by the policy"
        counts[why] = counts.get(why, 0) + 1
    return counts
