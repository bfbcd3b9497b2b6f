"""A judge that selects frames of a video before it scores, after VR-Thinker (arXiv 2510.10518)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rewards.base import Scores
from rewards.frames import middles
from rewards.judges.asking import Judge, Question, Replies, one_each, question, texts
from rewards.judges.replies import ReplyError, read_answer, read_selection
from rewards.judges.settings import WrittenRewardSettings

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = (
    'These are {shown} of the {count} frames of a video made for "{prompt}". Score it from {lowest} (worst) to '
    "{highest} (best) for what it shows, how it moves and how it is made. "
)
CHOOSE = (
    "Think inside <think> </think>. Then either ask for up to {more} further frames by their numbers, "
    "<select>1, 2</select>, or give the score, <answer>score</answer>."
)
DECIDE = "Think inside <think> </think>, then give the score now, <answer>score</answer>."
THOUGHTS = "\nWhat you wrote so far:\n{thoughts}"


class VideoJudge(WrittenRewardSettings):
    """A judge is shown a few frames, may request more over several rounds, then scores in 0 .. 1.

    ``frames`` are those shown at first. A reply with neither a score nor frames to see is a missing score.
    """

    kind: Literal["video_judge"] = Field("video_judge", description="a judge that selects frames")
    frames: int | None = Field(4, ge=1, description="frames shown first, evenly spaced; null = all")
    more: int = Field(4, ge=1, description="maximum number of frames per request")
    rounds: int = Field(2, ge=0, description="maximum number of requests for frames; 0 = none")
    template: str = Field(TEMPLATE, description="question, with {prompt}, {shown}, {count}, {lowest}, {highest}")

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """A question per round for every sample that has no score yet."""
        import torch

        videos = media if media.ndim == 5 else media[:, None]
        count = videos.shape[1]
        seen = [middles(count, self.frames) for _ in prompts]
        thoughts: list[list[str]] = [[] for _ in prompts]
        values, reasons = torch.full((len(prompts),), torch.nan), dict[int, str]()
        waiting = list(range(len(prompts)))
        for left in range(self.rounds, -1, -1):
            asked = [
                self._ask([] if image is None else [image[i]], videos[i], prompts[i], seen[i], thoughts[i], left)
                for i in waiting
            ]
            found: Replies = texts(judge, asked, self.longest)
            again = []
            for place, (i, text) in enumerate(zip(waiting, found.values, strict=True)):
                if place in found.reasons:
                    reasons[i] = found.reasons[place]
                    continue
                try:
                    wanted = self._wanted(text, count, seen[i], left)
                    if wanted is None:
                        values[i] = read_answer(text, self.lowest, self.highest)
                    else:
                        seen[i] = sorted({*seen[i], *wanted})
                        thoughts[i].append(text)
                        again.append(i)
                except ReplyError as error:
                    reasons[i] = str(error)
            waiting = again
        looked = torch.tensor([float(len(frames)) for frames in seen])
        return one_each(self.unit(values), reasons, {"frames": looked})

    def _ask(
        self, source: list[Tensor], video: Tensor, prompt: str, seen: list[int], thoughts: list[str], left: int
    ) -> Question:
        content = [*source, *(part for index in seen for part in (f"Frame {index + 1}: ", video[index]))]
        choice = CHOOSE if left and len(seen) < len(video) else DECIDE
        history = THOUGHTS if thoughts else ""
        return question(
            self.template + choice + history,
            prompt,
            *content,
            shown=len(seen),
            count=len(video),
            more=self.more,
            thoughts="\n".join(thoughts),
            **self.scale,
        )

    def _wanted(self, text: str, count: int, seen: list[int], left: int) -> list[int] | None:
        """Frames to be shown next, or None if it does not ask, or may not."""
        if not left or len(seen) == count or "<answer>" in text.lower():
            return None
        return read_selection(text, count)[: self.more] or None
