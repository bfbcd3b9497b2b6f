"""PaCo (arXiv 2512.04784): pairwise consistency of an image's sub-images."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from rewards.base import Scores
from rewards.judges.asking import Judge, Question, answered, per_sample, question, shown
from rewards.judges.models import Needs
from rewards.judges.settings import SourceRewardSettings
from rewards.judges.verdicts import panels, share

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = "Are these two images consistent in {criterion}? Answer yes or no."


class Paco(SourceRewardSettings):
    """Mean P(yes, consistent) over pairs of sub-images and over criteria; differentiable with a local judge."""

    needs: ClassVar[Needs] = "answers"
    taught: ClassVar[bool] = True
    kind: Literal["paco"] = Field("paco", description="pairwise consistency of sub-images")
    template: str = Field(TEMPLATE, description="question, with {criterion} and optionally {prompt}")
    criteria: list[str] = Field(["identity and style"], min_length=1, description="properties that must be consistent")
    rows: int = Field(2, ge=1, description="rows of sub-images")
    columns: int = Field(2, ge=1, description="columns of sub-images")
    source: bool = Field(
        False, description="add the prompt's source image as one more sub-image, for edits and subjects"
    )

    @model_validator(mode="after")
    def _pairs(self) -> Paco:
        if self.rows * self.columns + self.source < 2:
            raise ValueError("one sub-image has nothing to be consistent with; set rows, columns or source")
        return self

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """A question per pair and criterion, of the frames that are shown of a video each."""
        if min(media.shape[-2] // self.rows, media.shape[-1] // self.columns) < 1:
            raise ValueError(f"{list(media.shape[-2:])} pixels cannot be cut into {self.rows} x {self.columns}")
        asked: list[Question] = []
        owners: list[int] = []
        for i, prompt in enumerate(prompts):
            for frame in shown(media[i], self.frames):
                asked += self._asked(prompt, frame, None if image is None else image[i])
            owners += [i] * (len(asked) - len(owners))
        found = answered(judge, asked, self.answers)
        parts_of = {"answered": found.values.exp().sum(1)}
        return per_sample(share(found.values), owners, len(prompts), found.reasons, parts_of)

    def lessons(self, prompt: str, chosen: Tensor, rejected: Tensor) -> list[tuple[Question, int]]:
        """Yes for every pair of sub-images of the chosen image, no for every pair of the rejected one."""
        sides = [
            [one for frame in shown(side, self.frames) for one in self._asked(prompt, frame)]
            for side in (chosen, rejected)
        ]
        return [(one, answer) for answer, asked in enumerate(sides) for one in asked]

    def _asked(self, prompt: str, frame: Tensor, image: Tensor | None = None) -> list[Question]:
        """A question per pair and criterion of one image."""
        parts = [*([] if image is None else [image]), *panels(frame, self.rows, self.columns)]
        pairs = combinations(parts, 2)
        return [question(self.template, prompt, *pair, criterion=one) for pair in pairs for one in self.criteria]
