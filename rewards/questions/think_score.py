"""A judge that reasons in writing and then scores (DeScore and similar); parsed, so not differentiable."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rewards.base import Scores
from rewards.judges.asking import Judge, each_sample, one_each, written
from rewards.judges.replies import read_answer
from rewards.judges.settings import WrittenRewardSettings

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = (
    'This {medium} was made for "{prompt}". Think about what it shows, what is missing or wrong, and how well it is '
    "made, inside <think> </think>. Then give a score from {lowest} (worst) to {highest} (best), in the form "
    "<answer>score</answer>."
)


class ThinkScore(WrittenRewardSettings):
    """A judge reasons in writing, then scores in 0 .. 1. A reply without a score is a missing score."""

    kind: Literal["think_score"] = Field("think_score", description="a judge that reasons, then scores")
    template: str = Field(TEMPLATE, description="question, with {prompt}, {lowest} and {highest}")

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One reply per sample."""
        asked = each_sample(self.template, media, prompts, self.frames, image, **self.scale)
        read = partial(read_answer, lowest=self.lowest, highest=self.highest)
        found = written(judge, asked, self.longest, read)
        return one_each(self.unit(found.values), found.reasons)
