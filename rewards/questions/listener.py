"""A judge that gives reasons, and a second judge that reads them and answers too (after arXiv 2506.22832)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError, Scores
from rewards.judges.asking import Judge, Question, Replies, answered, each_sample, one_each, texts
from rewards.judges.models import AnyJudge, Needs
from rewards.judges.replies import YES_NO, ReplyError, read_reasons
from rewards.judges.settings import SourceRewardSettings
from rewards.judges.verdicts import listener_shaped, share

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.judges.loading import load_judge
else:
    load_judge = lazy("rewards.judges.loading:load_judge")

TEMPLATE = (
    'This {medium} was made for "{prompt}". Does it show all that was asked for, and is it well made? Give your '
    "reasons inside <reason> </reason>, then the verdict, <answer>yes</answer> or <answer>no</answer>."
)
HEARD = (
    'This {medium} was made for "{prompt}". Somebody said about it:\n{reason}\nLook for yourself. Does it show all '
    "that was asked for, and is it well made? Please answer yes or no."
)


@dataclass(frozen=True)
class ReasonerAndListener:
    """A judge that writes and one that answers, combined into one."""

    reasoner: Judge
    listener: Judge
    differentiable = False

    def fingerprint(self) -> str:
        """Digests of both, where they are known."""
        return self.reasoner.fingerprint() + self.listener.fingerprint()

    def ready(self, needs: Needs, answers: Sequence[Sequence[str]]) -> None:
        """Whether the one can write, and the other say yes or no; raises RewardError."""
        self.reasoner.ready("reply", ())
        try:
            self.listener.ready("answers", YES_NO)
        except RewardError as error:
            raise RewardError(f"listener: {error}") from error

    def answers(self, questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> Replies:
        """The listener's."""
        return self.listener.answers(questions, answers)

    def likelihoods(self, questions: Sequence[Question], replies: Sequence[str]) -> Replies:
        """The listener's."""
        return self.listener.likelihoods(questions, replies)

    def write(self, questions: Sequence[Question], longest: int) -> Replies:
        """The reasoner's."""
        return self.reasoner.write(questions, longest)


class Listener(SourceRewardSettings):
    """One judge reasons and says yes or no, a second reads its reasons: half the verdict, half the second's P(yes).

    A reply without reasons or verdict is a missing score. The second judge does not read the verdict itself.
    """

    needs: ClassVar[Needs] = "reply"
    kind: Literal["listener"] = Field("listener", description="a judge that gives reasons, and one that reads them")
    listener: AnyJudge | None = Field(None, description="judge that reads the reasons; null = the same judge")
    template: str = Field(TEMPLATE, description="question to the first judge, with {prompt}")
    heard: str = Field(HEARD, description="question to the second judge, with {prompt} and {reason}")
    longest: int = Field(1024, ge=1, description="maximum number of tokens per reply")

    def load(self, device: torch.device | str) -> Reward:
        """Load both judges, or check that their servers can do what is needed."""
        reasoner = load_judge(self.judge, device)
        return self.around(
            ReasonerAndListener(reasoner, load_judge(self.listener, device) if self.listener else reasoner)
        )

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One reply and then one answer per sample."""
        import torch

        replies = texts(judge, each_sample(self.template, media, prompts, self.frames, image), self.longest)
        asked = [Question((), replies.reasons.get(i, "")) for i in range(len(prompts))]
        verdict = torch.full((len(prompts),), torch.nan)
        for i, reply in enumerate(replies.values):
            if i in replies.reasons:
                continue
            try:
                reason, verdict[i] = read_reasons(reply)
            except ReplyError as error:
                asked[i] = Question((), str(error))
                continue
            source = None if image is None else image[i : i + 1]
            asked[i] = each_sample(self.heard, media[i : i + 1], [prompts[i]], self.frames, source, reason=reason)[0]
        found = answered(judge, asked, YES_NO)
        heard = share(found.values)
        verdict = verdict.to(heard.device)
        parts = {"verdict": verdict, "agreement": torch.where(verdict > 0, heard, 1 - heard)}
        values = listener_shaped(torch.zeros_like(verdict), verdict, heard)
        return one_each(values, found.reasons, parts)
