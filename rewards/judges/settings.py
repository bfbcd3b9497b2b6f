"""Settings of rewards that query a vision-language model, local or behind an OpenAI-compatible server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from alignflow.lazy import lazy
from rewards.base import Reward, Scope, Scores
from rewards.judges.models import AnyJudge, Local, Needs
from rewards.judges.replies import YES_NO
from rewards.model_settings import LoadedRewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.judges.asking import Judge, Question
    from rewards.judges.loading import load_judge
else:
    load_judge = lazy("rewards.judges.loading:load_judge")

Opponents = Annotated[
    int | None,
    Field(
        ge=1,
        description="samples of the same prompt each is compared with, the next ones in a ring; null = all others",
    ),
]


class JudgeRewardSettings(LoadedRewardSettings):
    """A question to a vision-language model. A subclass has ``needs`` and :meth:`score`.

    A video is shown as its frames, one image after the other, in one question.
    """

    needs: ClassVar[Needs]
    taught: ClassVar[bool] = False
    """Whether a judge can be taught to answer it by pairs, see :meth:`lessons`."""
    judge: AnyJudge = Field(Local(), description="judge model: local or endpoint")
    frames: int | None = Field(8, ge=1, description="frames shown per video, evenly spaced; null = all")

    @property
    def answers(self) -> tuple[tuple[str, ...], ...]:
        """K answers, each the spellings whose probabilities are summed: yes and no; none where none are asked about."""
        return YES_NO if self.needs == "answers" else ()

    @property
    def span(self) -> tuple[float, float]:
        """Lowest and highest score."""
        return (0.0, 1.0)

    @property
    def scope(self) -> Scope:
        """Scope of samples that must be scored together."""
        return "sample"

    def compares(self) -> Scope | None:
        """See :class:`~rewards.base.RewardSettings`."""
        return self.scope

    def gradient(self) -> bool:
        """A local judge passes it from probabilities to the pixels; written replies have none."""
        return self.judge.kind == "local" and self.needs != "reply"

    @property
    def wants(self) -> tuple[str, ...]:
        """Inputs that prompts must come with."""
        return ()

    def load(self, device: torch.device | str) -> Reward:
        """Load the judge, or check that its server can do what is needed."""
        return self.around(load_judge(self.judge, device))

    def around(self, judge: Judge) -> Reward:
        """The reward that asks this judge; RewardError if it cannot answer."""
        judge.ready(self.needs, self.answers)

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Scores:
            return self.score(judge, media, prompts, group, **inputs) if prompts else Scores(media.new_zeros(0))

        return Reward(
            getattr(self, "kind", ""),
            function,
            self.span,
            judge.differentiable and self.gradient(),
            self.wants,
            self.scope,
            judge.fingerprint,
        )

    def lessons(self, prompt: str, chosen: Tensor, rejected: Tensor) -> list[tuple[Question, int]]:
        """Training examples of a judge from a pair of media: questions, and the right answers."""
        raise NotImplementedError

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """The question and its formula.

        Args:
            media: ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` in [0, 1].
            group: ``[N]`` prompt numbers, or None.
            image: source images ``[N, 3, H, W]`` of those that want them.
        """
        raise NotImplementedError


class SourceRewardSettings(JudgeRewardSettings):
    """A judge that can be shown the source image of an edit."""

    source: bool = Field(False, description="show the prompt's source image first, for edits")

    @property
    def wants(self) -> tuple[str, ...]:
        """The source, where it is shown."""
        return ("image",) if self.source else ()


class WrittenRewardSettings(SourceRewardSettings):
    """A judge that writes a number on a scale, which is parsed from its reply; not differentiable."""

    needs: ClassVar[Needs] = "reply"
    lowest: float = Field(0.0, description="lowest score of the scale")
    highest: float = Field(10.0, description="highest score of the scale")
    longest: int = Field(1024, ge=1, description="maximum number of tokens per reply")

    @model_validator(mode="after")
    def _rising(self) -> WrittenRewardSettings:
        check_rising(self.lowest, self.highest)
        return self

    @property
    def scale(self) -> dict[str, str]:
        """Both ends, for the template."""
        return {"lowest": f"{self.lowest:g}", "highest": f"{self.highest:g}"}

    def unit(self, values: Tensor) -> Tensor:
        """Scores on the scale -> 0 .. 1."""
        return (values - self.lowest) / (self.highest - self.lowest)


def check_rising(lowest: float, highest: float) -> None:
    """ValueError unless ``lowest`` is below ``highest``."""
    if lowest >= highest:
        raise ValueError(f"lowest {lowest:g} should be below highest {highest:g}")
