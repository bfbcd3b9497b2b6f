"""Expected value of the digit a judge would answer: Edit-R1's reward (UniWorld-V2, arXiv 2510.16888)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from rewards.base import Scores
from rewards.judges.asking import Judge, answered, each_sample, one_each
from rewards.judges.models import Needs
from rewards.judges.settings import SourceRewardSettings, check_rising
from rewards.judges.verdicts import expectation

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = (
    'How well does the {medium} show "{prompt}", and how well is it made? Answer with one digit from {lowest} (not at '
    "all) to {highest} (perfectly), and nothing else."
)
EDIT = (
    'The first picture was to be edited: "{prompt}". The second is the result. How well was the instruction followed, '
    "with everything else kept as it was? Answer with one digit from {lowest} (not at all) to {highest} (perfectly), "
    "and nothing else."
)


class DigitJudge(SourceRewardSettings):
    """Expected value of the digit a judge answers with, scaled to 0 .. 1; differentiable with a local judge."""

    needs: ClassVar[Needs] = "answers"
    kind: Literal["digit_judge"] = Field("digit_judge", description="expected digit of a judge")
    template: str | None = Field(
        None, description="question, with {prompt}, {lowest} and {highest}; null = one of the two built-in questions"
    )
    lowest: int = Field(0, ge=0, le=8, description="lowest digit of the scale")
    highest: int = Field(5, ge=1, le=9, description="highest digit of the scale")

    @model_validator(mode="after")
    def _rising(self) -> DigitJudge:
        check_rising(self.lowest, self.highest)
        return self

    @property
    def answers(self) -> tuple[tuple[str, ...], ...]:
        """The digits, rising."""
        return tuple((str(digit),) for digit in range(self.lowest, self.highest + 1))

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One question per sample."""
        template = self.template or (EDIT if self.source else PLAIN)
        scale = {"lowest": self.lowest, "highest": self.highest}
        asked = each_sample(template, media, prompts, self.frames, image, **scale)
        found = answered(judge, asked, self.answers)
        parts = {"answered": found.values.exp().sum(1)}
        return one_each(expectation(found.values), found.reasons, parts)
