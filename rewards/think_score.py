"""A judge that thinks in writing and then scores (DeScore and its kind); parsed, so without gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from rewards.base import Scores
from rewards.judge import JudgeRewardSettings, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from rewards.asking import Judge

TEMPLATE = (
    'This {medium} was made for "{prompt}". Think about what it shows, what is missing or wrong, and how well it is '
    "made, inside <think> </think>. Then give a score from {lowest} (worst) to {highest} (best), in the form "
    "<answer>score</answer>."
)


class ThinkScore(JudgeRewardSettings):
    """A judge thinks in writing, then scores; lowest 0, highest 1. A reply without a score is a missing score."""

    needs: ClassVar[Needs] = "reply"
    kind: Literal["think_score"] = Field("think_score", description="a judge that thinks, then scores")
    template: str = Field(TEMPLATE, description="the question, with {prompt}, {lowest} and {highest}")
    lowest: float = Field(0.0, description="score of the worst")
    highest: float = Field(10.0, description="score of the best")
    longest: int = Field(1024, ge=1, description="most tokens of a reply")
    source: bool = Field(False, description="show the prompt's own picture first, for edits")

    @model_validator(mode="after")
    def _rising(self) -> ThinkScore:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest} should be below highest {self.highest}")
        return self

    @property
    def wants(self) -> tuple[str, ...]:
        """The source, where it is shown."""
        return ("image",) if self.source else ()

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One reply per sample."""
        from functools import partial

        from rewards.asking import per_sample, question, shown, written
        from rewards.replies import read_answer

        said = {
            "medium": "image" if media.ndim == 4 else "video",
            "lowest": f"{self.lowest:g}",
            "highest": f"{self.highest:g}",
        }
        asked = [
            question(
                self.template, prompt, *([] if image is None else [image[i]]), *shown(media[i], self.frames), **said
            )
            for i, prompt in enumerate(prompts)
        ]
        read = partial(read_answer, lowest=self.lowest, highest=self.highest)
        found = written(judge, asked, self.longest, read)
        values = (found.values - self.lowest) / (self.highest - self.lowest)
        return per_sample(values, range(len(asked)), len(asked), found.reasons)
