"""Questions to a judge about a case, and its replies over one or several rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from align.data.pair_table import Judged, labels_of
from align.maths.seeds import derive
from align.reasoning.reasoner import Reasoner
from align.reasoning.settings import Reply
from align.reasoning.words import CHOOSE, DIMENSIONS, HISTORY, Written, read_written
from rewards.frames import middles
from rewards.judges.asking import Content, Question, question, shown, two


@dataclass(frozen=True)
class Case:
    """A question about a pair, with the right verdict: the place of the better sample, or 1 = yes and 2 = no.

    Args:
        medium: Image or Video.
        media: the samples in the order shown, images ``[3, H, W]`` or videos ``[F, 3, H, W]``.
        dimensions: right verdict of each dimension, 0 = a tie, None = unknown.
    """

    row: Judged
    question: Question
    right: int
    medium: str
    media: tuple[Tensor, ...] = ()
    dimensions: tuple[int | None, ...] = ()

    def judged(self, one: Written) -> tuple[float, float]:
        """Whether a verdict is right, 0 or 1, and the share of the known dimensions that are."""
        right = float(one.verdict == self.right)
        known = [place for place, wanted in enumerate(self.dimensions) if wanted is not None]
        if not known:
            return right, right
        return right, sum(one.dimensions[place] == self.dimensions[place] for place in known) / len(known)


@dataclass
class Trace:
    """Questions about a case and the judge's replies, round by round."""

    case: Case
    questions: list[Question]
    replies: list[list[int]] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)

    @property
    def last(self) -> Written:
        """The final reply."""
        return self.written[-1]

    @property
    def form(self) -> bool:
        """Whether every reply has its form."""
        return all(one.form for one in self.written)


class Rounds:
    """Questions and replies over at most ``reply.rounds`` requests for frames, as in VR-Thinker (arXiv 2510.10518).

    A question holds the frames shown first, all that was written, and the frames of the latest ``reply.window``
    requests. Frames of the second video are numbered after those of the first.

    Args:
        frames: shown per video at first.
    """

    def __init__(self, reply: Reply, frames: int | None, writer: Reasoner) -> None:
        self.reply, self.frames, self.writer = reply, frames, writer

    def question(
        self, prompt: str, media: Sequence[Tensor], asked: Sequence[Sequence[int]] = (), thoughts: Sequence[str] = ()
    ) -> Question:
        """The question after some requests for frames.

        Args:
            media: one sample, or two.
            asked: frames that each request asked for.
            thoughts: what was written in each.
        """
        names = self.reply.dimensions
        ask = DIMENSIONS.replace("{names}", ", ".join(names)).replace("{first}", names[0]) if names else ""
        template = self.reply.question + ask
        if not self.reply.rounds:
            if len(media) == 2:
                return two(template, media[0], media[1], prompt, self.frames)
            medium = "image" if media[0].ndim == 3 else "video"
            return question(template, prompt, *shown(media[0], self.frames), medium=medium)
        every = [frame for one in media for frame in shown(one)]
        content, first, start = list[Content](), 0, 0
        medium = "Image" if media[0].ndim == 3 else "Video"
        for place, one in enumerate(media, 1):
            count = len(shown(one))
            numbers = [start + index for index in middles(count, self.frames)]
            content += [f"{medium} {place}: ", *_labelled(every, numbers)]
            first, start = first + len(numbers), start + count
        for wanted in list(asked)[-self.reply.window :] if self.reply.window else []:
            content += ["Frames that you asked for: ", *_labelled(every, wanted)]
        choice = CHOOSE if len(thoughts) < self.reply.rounds else ""
        values = {"medium": medium, "shown": first, "count": len(every), "more": self.reply.more}
        said = {"thoughts": "\n".join(thoughts)}
        return question(template + choice + (HISTORY if thoughts else ""), prompt, *content, **values, **said)

    def think(self, cases: Sequence[Case], seeds: Sequence[int], temperature: float) -> list[Trace]:
        """Replies to each case, until one is final; each depends on its own seed alone."""
        traces = [Trace(case, [case.question]) for case in cases]
        waiting = list(range(len(traces)))
        for number in range(self.reply.rounds + 1):
            own = [derive(seeds[row], "round", number) if number else seeds[row] for row in waiting]
            asked = [traces[row].questions[-1] for row in waiting]
            replies = self.writer.sample(asked, own, temperature, self.reply.longest)
            waiting = [row for row, tokens in zip(waiting, replies, strict=True) if self._told(traces[row], tokens)]
            if not waiting:
                break
        return traces

    def replayed(self, case: Case, replies: Sequence[list[int]]) -> Trace:
        """The trace in which these replies were written."""
        trace = Trace(case, [case.question])
        for tokens in replies:
            self._told(trace, tokens)
        return trace

    def _told(self, trace: Trace, tokens: list[int]) -> bool:
        """Whether a reply, which is put into the trace, asks for frames."""
        case, left = trace.case, self.reply.rounds - len(trace.replies)
        count = sum(len(shown(one)) for one in case.media) if left else 0
        one = read_written(self.writer.text(tokens), self.reply.shows, self.reply.dimensions, count)
        trace.replies.append(tokens)
        trace.written.append(one)
        if not one.asked:
            return False
        asked = [each.asked[: self.reply.more] for each in trace.written]
        thoughts = [self.writer.text(each) for each in trace.replies]
        trace.questions.append(self.question(case.row.prompt.text, case.media, asked, thoughts))
        return True


def _labelled(every: Sequence[Tensor], numbers: Sequence[int]) -> list[Content]:
    return [part for number in numbers for part in (f"Frame {number + 1}: ", every[number])]


def flat(traces: Sequence[Trace]) -> tuple[list[Question], list[list[int]], list[int]]:
    """Questions and replies of all rounds, and the number of the trace of each."""
    asked = [question for one in traces for question in one.questions]
    replies = [tokens for one in traces for tokens in one.replies]
    return asked, replies, [number for number, one in enumerate(traces) for _ in one.replies]


def verdicts(row: Judged, names: Sequence[str], swapped: bool) -> tuple[int | None, ...]:
    """Right verdict of each dimension: the place of the sample with the higher label, 0 if equal, None if unknown.

    Raises:
        DataError: a label is not a number.
    """
    if not names:
        return ()
    chosen, rejected = (side[0] for side in labels_of([row], names, needed=False))
    found: list[int | None] = []
    for first, second in zip(chosen, rejected, strict=True):
        higher = 1 if first > second else 2
        known = math.isfinite(first) and math.isfinite(second)
        found.append((0 if first == second else 3 - higher if swapped else higher) if known else None)
    return tuple(found)
