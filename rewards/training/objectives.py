"""Training objectives of heads: a loss with its settings. Torch only inside functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rewards.training.losses import (
    bradley_terry,
    criterion_error,
    gaussian_difference,
    idle_gates,
    part_order,
    per_dimension,
    ranking_margin,
    rao_kupper,
    regression,
    win_tie,
)
from rewards.training.settings import HeadSettings, MoESettings, Settings

if TYPE_CHECKING:
    from torch import Tensor

    Labels = tuple[Tensor, Tensor]


class Objective(Settings):
    """Base of every loss: outputs ``[M, K]`` of both sides, and what is known of the pairs -> loss ``[M]``."""

    kind: str
    ties: ClassVar[bool] = False
    """Whether pairs without a winner are learned from; elsewhere they are left out."""
    single: ClassVar[bool] = False
    """Whether the table holds single images with a number each; then ``second`` is not there."""
    heads: ClassVar[tuple[str, ...]] = ()
    """Kinds of head it is made for; any if empty."""
    labelled: ClassVar[bool] = False
    """Whether it learns from the head's labels, see :attr:`~rewards.training.settings.HeadSettings.labels`."""

    def loss(self, first: Tensor, second: Tensor, outcome: Tensor) -> Tensor:
        """``outcome [M]``: 1 = the first is better, 0 = tie; of single images the number to predict."""
        raise NotImplementedError

    def pair_loss(
        self, first: Tensor, second: Tensor, outcome: Tensor, labels: Labels | None, head: HeadSettings
    ) -> Tensor:
        """:meth:`loss`, for one that is ``labelled`` with labels ``[M, L]`` of both sides, NaN where unknown."""
        return self.loss(first, second, outcome)


class BradleyTerry(Objective):
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin); ties are left out."""

    kind: Literal["bt"] = Field("bt", description="Bradley-Terry")
    margin: float = Field(
        0.0, ge=0, description="score difference between chosen and rejected at which the loss is ln 2"
    )

    def loss(self, first: Tensor, second: Tensor, outcome: Tensor) -> Tensor:
        return bradley_terry(first[:, 0], second[:, 0], self.margin)


class RaoKupper(Objective):
    """Bradley-Terry with ties (Rao and Kupper), as in VideoAlign's BTT."""

    ties: ClassVar[bool] = True
    kind: Literal["rao_kupper"] = Field("rao_kupper", description="Bradley-Terry with ties")
    k: float = Field(5.0, gt=1, description="tie parameter; larger values make ties likelier")

    def loss(self, first: Tensor, second: Tensor, outcome: Tensor) -> Tensor:
        return rao_kupper(first[:, 0], second[:, 0], outcome, self.k)


class WinTie(Objective):
    """Cross-entropy with target 1 for a win and 1/2 for a tie, as in SoliReward's BT-WT."""

    ties: ClassVar[bool] = True
    kind: Literal["win_tie"] = Field("win_tie", description="wins and ties")

    def loss(self, first: Tensor, second: Tensor, outcome: Tensor) -> Tensor:
        return win_tie(first[:, 0], second[:, 0], (outcome + 1) / 2)


class Triplet(Objective):
    """Triplet margin on squared distances to the prompt on the unit sphere, as in Social Reward."""

    heads: ClassVar[tuple[str, ...]] = ("cosine",)
    kind: Literal["triplet"] = Field("triplet", description="triplet margin")
    margin: float = Field(0.3, gt=0, description="margin between squared distances, which are 2 - 2 cos")

    def loss(self, first: Tensor, second: Tensor, outcome: Tensor) -> Tensor:
        return ranking_margin(2 * first[:, 0], 2 * second[:, 0], self.margin)


class Regression(Objective):
    """Squared error against column score; the table holds single images: prompt, image, score."""

    single: ClassVar[bool] = True
    kind: Literal["regression"] = Field("regression", description="squared error")

    def loss(self, first: Tensor, second: Tensor, outcome: Tensor) -> Tensor:
        return regression(first[:, 0], outcome)


class Gaussian(Objective):
    """Mean of Bradley-Terry over Gaussian scores, as in HPSv3; ties are left out."""

    heads: ClassVar[tuple[str, ...]] = ("uncertain",)
    kind: Literal["gaussian"] = Field("gaussian", description="Bradley-Terry with uncertain scores")

    def loss(self, first: Tensor, second: Tensor, outcome: Tensor) -> Tensor:
        return gaussian_difference(first[:, 0], first[:, 1], second[:, 0], second[:, 1])


class PerDimension(Objective):
    """Bradley-Terry with ties in every dimension, as in VideoReward; the order of the pair itself is not used."""

    ties: ClassVar[bool] = True
    heads: ClassVar[tuple[str, ...]] = ("dimensions",)
    labelled: ClassVar[bool] = True
    kind: Literal["per_dimension"] = Field("per_dimension", description="Bradley-Terry with ties in every dimension")
    k: float = Field(5.0, gt=1, description="tie parameter; larger values make ties likelier")

    def pair_loss(
        self, first: Tensor, second: Tensor, outcome: Tensor, labels: Labels | None, head: HeadSettings
    ) -> Tensor:
        assert labels is not None
        return per_dimension(first[:, 1:], second[:, 1:], labels, self.k)


class Criteria(Objective):
    """Criteria, aspects, gates and the score together, as MJ-Video's joint stage (arXiv 2502.01719); ties are left out.

    Criteria and aspects are compared with their labels. Aspects and the score are ordered by Bradley-Terry. Gates of
    criteria and of aspects that do not apply to the prompt are pushed to 0.
    """

    heads: ClassVar[tuple[str, ...]] = ("moe",)
    labelled: ClassVar[bool] = True
    kind: Literal["criteria"] = Field("criteria", description="criteria, aspects, gates and the score, as MJ-Video")
    form: Literal["squared", "logistic"] = Field(
        "squared", description="error of a criterion or aspect: squared | logistic, for labels in 0 .. 1"
    )
    criteria: float = Field(0.3, ge=0, description="weight of the criteria's errors (MJ-Video: 0.3)")
    aspects: float = Field(1.0, ge=0, description="weight of the aspects' errors and of their order (MJ-Video: 1)")
    gates: float = Field(0.5, ge=0, description="weight of gates that do not apply (MJ-Video: 0.5)")
    score: float = Field(1.0, ge=0, description="weight of the order of the score (MJ-Video: 1)")

    def pair_loss(
        self, first: Tensor, second: Tensor, outcome: Tensor, labels: Labels | None, head: HeadSettings
    ) -> Tensor:
        assert labels is not None
        assert isinstance(head, MoESettings)
        groups = head.sizes
        sizes = [1, len(groups), sum(groups), sum(groups), len(groups)]
        loss, orders = self.score * bradley_terry(first[:, 0], second[:, 0]), []
        for output, label in zip((first, second), labels, strict=True):
            _, aspects, criteria, gates, shares = output.split(sizes, -1)
            wanted = label.split([len(groups), sum(groups)], -1)
            loss = loss + self.criteria * criterion_error(criteria, wanted[1], self.form)
            loss = loss + self.aspects * criterion_error(aspects, wanted[0], self.form)
            idle = idle_gates(gates, wanted[1], groups) + idle_gates(shares, wanted[0], [len(groups)])
            loss = loss + self.gates * idle
            orders.append((aspects, wanted[0]))
        (a, label_a), (b, label_b) = orders
        return loss + self.aspects * part_order(a, b, (label_a, label_b))


OBJECTIVES: dict[str, type[Objective]] = {
    cls.model_fields["kind"].default: cls
    for cls in (BradleyTerry, RaoKupper, WinTie, Triplet, Regression, Gaussian, PerDimension, Criteria)
}
"""Kind -> settings."""
