"""UnifiedReward (arXiv 2503.05236) and UnifiedReward-Think (2505.03318): written scores and verdicts.

What is read are the authors' formats: a number behind "Final Score:", "Image 1 is better", and the same inside
``<answer>``. The questions are worded here; ``template`` takes the very text of a model's card.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rewards.base import Scope, Scores
from rewards.judges.asking import Judge, compared, each_sample, one_each, tournament, written
from rewards.judges.replies import read_preference, read_score
from rewards.judges.settings import Opponents, WrittenRewardSettings
from rewards.judges.verdicts import matches

if TYPE_CHECKING:
    from torch import Tensor

POINT = (
    "Evaluate this {medium}, which was generated from a caption, for how well it matches the caption (objects, their "
    "attributes and relations) and for how well it is made (clarity, detail, colour). Assign a score from {lowest} to "
    "{highest} after 'Final Score:'.\nText Caption: [{prompt}]"
)
PAIR = (
    "Compare these two, which were generated from one caption, for how well they match the caption and for how well "
    'they are made. Conclude with "{medium} 1 is better", "{medium} 2 is better" or "Both {medium}s are equally good".'
    "\nText Caption: [{prompt}]"
)
THINK = PAIR + "\nThink step by step inside <think> </think>, then put the conclusion inside <answer> </answer>."


class UnifiedReward(WrittenRewardSettings):
    """UnifiedReward in its three formats: a score, a comparison within a prompt in both orders, a reasoned comparison.

    Scores are brought to 0 .. 1. A reply without a score or verdict is a missing score.
    """

    kind: Literal["unified_reward"] = Field("unified_reward", description="UnifiedReward")
    format: Literal["point", "pair", "think"] = Field(
        "point", description="point = a score per sample | pair = comparisons | think = comparisons after reasoning"
    )
    template: str | None = Field(
        None, description="question, with {prompt}; null = the built-in question of the format"
    )
    lowest: float = Field(1.0, description="lowest score in format point; 1 in the published formats")
    highest: float = Field(
        5.0, description="highest score in format point; 5 for images, 10 for UnifiedReward's videos"
    )
    opponents: Opponents = None

    @property
    def scope(self) -> Scope:
        """Comparisons need the other samples of the prompt."""
        return "sample" if self.format == "point" else "group"

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One reply per sample, or two per pair."""
        template = self.template or {"point": POINT, "pair": PAIR, "think": THINK}[self.format]
        if self.format != "point":
            pairs = matches(prompts, group, self.opponents)
            asked = compared(template, pairs, media, prompts, self.frames, image)
            verdict = partial(read_preference, think=self.format == "think")
            found = written(judge, asked, self.longest, verdict)
            return tournament(pairs, found.values, found.reasons, len(prompts))
        asked = each_sample(template, media, prompts, self.frames, image, **self.scale)
        read = partial(read_score, label="Final Score:", lowest=self.lowest, highest=self.highest)
        found = written(judge, asked, self.longest, read)
        return one_each(self.unit(found.values), found.reasons)
