"""What a judge that reasons is asked, and the form of its replies. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.judges.replies import ReplyError, read_preference

QUESTION = (
    'Which shows "{prompt}" better, {medium} 1 or {medium} 2? Say what each shows inside <think> </think>, then '
    'conclude with "{medium} 1 is better" or "{medium} 2 is better" inside <answer> </answer>.'
)
_FORM = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Written:
    """A written reply.

    Args:
        form: whether it is a thought with words and then an answer that is a verdict, and nothing else.
        verdict: place of the better sample, 1 or 2; 0 where the reply names none.
        thought: the words inside ``<think>``, "" where the form is wrong.
    """

    form: bool
    verdict: int
    thought: str


def read_written(reply: str) -> Written:
    """Form, verdict and thought of a reply. A verdict counts also where the form is wrong.

    >>> read_written("<think>two circles</think><answer>Image 2 is better</answer>")
    Written(form=True, verdict=2, thought='two circles')
    >>> read_written("Image 1 is better")
    Written(form=False, verdict=0, thought='')
    """
    try:
        share = read_preference(reply, think=True)
    except ReplyError:
        return Written(False, 0, "")
    verdict = {1.0: 1, 0.0: 2}.get(share, 0)
    found = _FORM.fullmatch(reply)
    thought = found[1].strip() if found and "<think>" not in found[1] else ""
    return Written(bool(thought and verdict), verdict, thought)


def conclusion(verdict: int, medium: str) -> str:
    """The answer of a reply: ``<answer>Image 1 is better</answer>``."""
    return f"<answer>{medium} {verdict} is better</answer>"


def reply_of(thought: str, verdict: int, medium: str) -> str:
    """A whole reply."""
    return f"<think>{thought}</think>{conclusion(verdict, medium)}"


def thought_of(first: str, second: str, medium: str) -> str:
    """A thought from what is said about each sample."""
    return f"{medium} 1: {first.strip()}. {medium} 2: {second.strip()}."
