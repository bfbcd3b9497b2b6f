"""PromptEcho: likelihood of the prompt as a judge's description of the image, without generating text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rewards.base import Scores
from rewards.judges.asking import Judge, each_sample, echoed, one_each
from rewards.judges.models import Needs
from rewards.judges.settings import JudgeRewardSettings
from rewards.texts import writable

if TYPE_CHECKING:
    from torch import Tensor


class PromptEcho(JudgeRewardSettings):
    """PromptEcho: log-likelihood of the prompt as a judge's description, at most 0; differentiable with a local judge.

    An endpoint must give ``prompt_logprobs``, as vLLM does.
    """

    needs: ClassVar[Needs] = "likelihood"
    kind: Literal["prompt_echo"] = Field("prompt_echo", description="likelihood of the prompt given the image")
    template: str = Field(
        "Describe this {medium} in detail.", description="question to which the prompt would be the reply"
    )
    reduce: Literal["mean", "sum"] = Field("mean", description="mean = per token | sum = over the whole prompt")

    @property
    def span(self) -> tuple[float, float]:
        """Log-probabilities."""
        return (float("-inf"), 0.0)

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One question per sample, its prompt the reply."""
        asked = each_sample(self.template, media, prompts, self.frames)
        asked = [
            one if prompt.strip() else replace(one, refused="the prompt is empty, it has no likelihood")
            for one, prompt in zip(asked, prompts, strict=True)
        ]
        found = echoed(judge, asked, [writable(prompt).strip() for prompt in prompts])
        total, tokens = found.values.unbind(1)
        values = total / tokens if self.reduce == "mean" else total
        return one_each(values, found.reasons, {"tokens": tokens})
