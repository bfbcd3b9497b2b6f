"""Probability that a judge answers yes: VQAScore (arXiv 2404.01291), or any other yes-or-no question."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rewards.base import Scores
from rewards.judges.asking import Judge, Question, answered, each_sample, one_each
from rewards.judges.models import Needs
from rewards.judges.settings import SourceRewardSettings
from rewards.judges.verdicts import share

if TYPE_CHECKING:
    from torch import Tensor

VQASCORE = 'Does this figure show "{prompt}"? Please answer yes or no.'


class YesProbability(SourceRewardSettings):
    """P(yes) of a vision-language judge, by default for VQAScore's question; differentiable with a local judge."""

    needs: ClassVar[Needs] = "answers"
    taught: ClassVar[bool] = True
    kind: Literal["yes_probability"] = Field("yes_probability", description="probability that a judge answers yes")
    template: str = Field(VQASCORE, description="question, with {prompt}; default: VQAScore's")
    variant: Literal["pair", "vocabulary"] = Field(
        "pair", description="pair = P(yes) / (P(yes) + P(no)) | vocabulary = P(yes) over all tokens, as in VQAScore"
    )

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One question per sample."""
        asked = each_sample(self.template, media, prompts, self.frames, image)
        found = answered(judge, asked, self.answers)
        total = found.values.exp().sum(1)
        values = share(found.values) if self.variant == "pair" else found.values[:, 0].exp()
        return one_each(values, found.reasons, {"answered": total})

    def lessons(self, prompt: str, chosen: Tensor, rejected: Tensor) -> list[tuple[Question, int]]:
        """Yes to the chosen, no to the rejected."""
        sides = ((chosen, 0), (rejected, 1))
        return [(each_sample(self.template, one[None], [prompt], self.frames)[0], right) for one, right in sides]
