"""A judge that scores every criterion of a rubric in one written reply."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from rewards.base import Scores
from rewards.judges.asking import Judge, each_sample, one_each, written
from rewards.judges.replies import read_rubric
from rewards.judges.settings import WrittenRewardSettings

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = (
    'This {medium} was made for "{prompt}". Score it by each of these criteria, from {lowest} (worst) to {highest} '
    "(best):\n{criteria}\nReply with one line per criterion, in the form name: score, and nothing else."
)


class Rubric(WrittenRewardSettings):
    """Weighted mean of a judge's scores for each criterion of a rubric, in 0 .. 1; every criterion is a part.

    A reply that leaves out a criterion is a missing score.
    """

    kind: Literal["rubric"] = Field("rubric", description="a judge that scores by criteria")
    criteria: dict[str, str] = Field(
        {
            "alignment": "it shows what was asked for",
            "coherence": "objects, anatomy and physics make sense",
            "quality": "it is sharp, detailed and well composed",
        },
        min_length=1,
        description="criteria: name and description of each",
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="weights of the criteria by name; 1 if not given"
    )
    template: str = Field(TEMPLATE, description="question, with {prompt}, {criteria}, {lowest} and {highest}")
    lowest: float = Field(1.0, description="lowest score of the scale")
    highest: float = Field(5.0, description="highest score of the scale")

    @model_validator(mode="after")
    def _consistent(self) -> Rubric:
        if unknown := sorted(set(self.weights) - set(self.criteria)):
            raise ValueError(f"weights of criteria that are not there: {', '.join(unknown)}")
        return self

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One reply per sample."""
        lines = "\n".join(f"{name}: {what}" for name, what in self.criteria.items())
        asked = each_sample(self.template, media, prompts, self.frames, image, criteria=lines, **self.scale)
        names = list(self.criteria)
        read = partial(read_rubric, names=names, lowest=self.lowest, highest=self.highest)
        found = written(judge, asked, self.longest, read)
        scores = self.unit(found.values.view(len(asked), -1))
        scores = scores.expand(-1, len(names))  # one column of NaN if no reply could be read
        share = scores.new_tensor([self.weights.get(name, 1.0) for name in names])
        values = scores @ (share / share.sum())
        parts = dict(zip(names, scores.unbind(1), strict=True))
        return one_each(values, found.reasons, parts)
