"""Pairwise comparison of samples of one prompt, each pair in both orders."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rewards.base import Scope, Scores
from rewards.judges.asking import Judge, Question, answered, compared, tournament, two
from rewards.judges.models import Needs
from rewards.judges.settings import Opponents, SourceRewardSettings
from rewards.judges.verdicts import matches, share

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = (
    'Which {medium} shows "{prompt}" better and is better made, {medium} 1 or {medium} 2? Answer with 1 or 2, and '
    "nothing else."
)


class Pairwise(SourceRewardSettings):
    """Share of a prompt's other samples that a judge ranks below a sample, over both orders; not differentiable.

    The part ``position_bias`` is P(first) + P(first, swapped) - 1: 0 for a judge that ignores positions.
    """

    needs: ClassVar[Needs] = "answers"
    taught: ClassVar[bool] = True
    kind: Literal["pairwise"] = Field("pairwise", description="share of comparisons won within a prompt")
    template: str = Field(TEMPLATE, description="question, with {prompt}; the answer is 1 or 2")
    opponents: Opponents = None

    @property
    def answers(self) -> tuple[tuple[str, ...], ...]:
        """The first, the second."""
        return (("1",), ("2",))

    @property
    def scope(self) -> Scope:
        """The samples of a prompt meet."""
        return "group"

    def gradient(self) -> bool:
        """None: what one sample gains another loses, so the sum of the scores is constant."""
        return False

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """Two questions per pair."""
        pairs = matches(prompts, group, self.opponents)
        asked = compared(self.template, pairs, media, prompts, self.frames, image)
        found = answered(judge, asked, self.answers)
        return tournament(pairs, share(found.values), found.reasons, len(prompts))

    def lessons(self, prompt: str, chosen: Tensor, rejected: Tensor) -> list[tuple[Question, int]]:
        """The place of the chosen, in both orders."""
        orders = ((chosen, rejected), (rejected, chosen))
        return [(two(self.template, *pair, prompt, self.frames), place) for place, pair in enumerate(orders)]
