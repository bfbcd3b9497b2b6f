"""Signs that a video is generated, with their place and time (after DeeptraceReward, arXiv 2509.22646)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rewards.base import Scores
from rewards.frames import middles
from rewards.judges.asking import Judge, Question, one_each, question, written
from rewards.judges.models import Needs
from rewards.judges.replies import read_fakeness
from rewards.judges.settings import JudgeRewardSettings
from rewards.rate import fps_of

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = (
    "Was this {medium} filmed, or was it generated? Look for what no camera sees: things that melt, blur, merge, "
    "split, vanish or move by themselves, parts too many or too few. If there is nothing of that kind, reply REAL. "
    "Otherwise reply FAKE, and behind it the corners of where it is worst, in pixels of {width} x {height}, "
    "<coordinates>[x0, y0, x1, y1]</coordinates>, the second at which it begins, <start_time>seconds</start_time>, and "
    "what it is, <explanation>words</explanation>."
)
PARTS = ("x0", "y0", "x1", "y1", "start")


class Deeptrace(JudgeRewardSettings):
    """A judge looks for signs that a video is generated: 1 if it says REAL, 0 if FAKE; place and time are parts.

    The prompt is not read. A reply that begins with neither is a missing score; a box or time that is not there, or not
    within the video, is a missing part.
    """

    needs: ClassVar[Needs] = "reply"
    renamed: ClassVar[dict[str, str]] = {"frame_rate": "fps"}
    kind: Literal["deeptrace"] = Field("deeptrace", description="a judge that locates signs of generation in a video")
    template: str = Field(TEMPLATE, description="question, with {medium}, {width} and {height}")
    fps: float | None = Field(
        None,
        gt=0,
        description="frames per second, for the times given to the judge; null = the file's rate, or 16 if unknown",
    )
    longest: int = Field(512, ge=1, description="maximum number of tokens per reply")

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One reply per sample."""
        videos = media if media.ndim == 5 else media[:, None]
        asked = [self._ask(video, media.ndim == 5) for video in videos]
        seconds, (height, width) = videos.shape[1] / fps_of(self.fps), videos.shape[-2:]
        found = written(judge, asked, self.longest, lambda reply: read(reply, width, height, seconds))
        rows = found.values.view(len(asked), -1).expand(-1, 1 + len(PARTS))  # one column where no reply could be read
        parts = dict(zip(PARTS, rows[:, 1:].unbind(1), strict=True))
        return one_each(rows[:, 0], found.reasons, parts)

    def _ask(self, video: Tensor, moves: bool) -> Question:
        """Frames, of a video each behind its time, and the question."""
        content = [
            part
            for index in middles(len(video), self.frames)
            for part in ((f"{index / fps_of(self.fps):.2f} s: ", video[index]) if moves else (video[index],))
        ]
        height, width = video.shape[-2:]
        medium = "video" if moves else "image"
        return question(self.template, "", *content, medium=medium, width=width, height=height)


def read(reply: str, width: int, height: int, seconds: float) -> list[float]:
    """``[1 = real, x0, y0, x1, y1, start]``: corners in shares of the sides, NaN for what is not within the video.

    Raises:
        ReplyError: no verdict.
    """
    fake, box, start = read_fakeness(reply)
    corners = [math.nan] * 4
    if fake and box is not None:
        x0, y0, x1, y1 = box
        if 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height:
            corners = [x0 / width, y0 / height, x1 / width, y1 / height]
    known = fake and start is not None and 0 <= start <= seconds
    return [float(not fake), *corners, float(start) if known and start is not None else math.nan]
