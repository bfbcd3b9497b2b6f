"""What a judge that reasons is asked, and the form of its replies. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.judges.replies import ReplyError, read_preference

QUESTION = (
    'Which shows "{prompt}" better, {medium} 1 or {medium} 2? Say what each shows inside <think> </think>, then '
    'conclude with "{medium} 1 is better" or "{medium} 2 is better" inside <answer> </answer>.'
)
QUESTION_ONE = (
    'Does this {medium} show "{prompt}"? Say what it shows inside <reason> </reason>, then conclude with '
    "<answer>Yes</answer> or <answer>No</answer>."
)
TAGS = {"pair": "think", "one": "reason"}
"""What a question shows -> tag around the thought, as ``unified_reward`` and ``listener`` read it."""


@dataclass(frozen=True)
class Written:
    """A written reply.

    Args:
        form: whether it is a thought with words and then an answer that is a verdict, and nothing else.
        verdict: of a pair the place of the better sample, 1 or 2; of one sample 1 = yes, 2 = no; 0 where there is none.
        thought: the words before the answer, "" where the form is wrong.
    """

    form: bool
    verdict: int
    thought: str


def read_written(reply: str, shows: str = "pair") -> Written:
    """Form, verdict and thought of a reply. A verdict counts also where the form is wrong.

    >>> read_written("<think>two circles</think><answer>Image 2 is better</answer>")
    Written(form=True, verdict=2, thought='two circles')
    >>> read_written("<reason>two circles</reason><answer>Yes</answer>", "one")
    Written(form=True, verdict=1, thought='two circles')
    >>> read_written("Image 1 is better")
    Written(form=False, verdict=0, thought='')

    Args:
        shows: pair or one.
    """
    verdict = _verdict(reply, shows)
    tag = TAGS[shows]
    found = re.fullmatch(rf"\s*<{tag}>(.*?)</{tag}>\s*<answer>(.*?)</answer>\s*", reply, re.DOTALL | re.IGNORECASE)
    thought = found[1].strip() if found and verdict and f"<{tag}>" not in found[1] else ""
    return Written(bool(thought), verdict, thought)


def _verdict(reply: str, shows: str) -> int:
    if shows == "one":
        answers = re.findall(r"<answer>\W*(.*?)\W*</answer>", reply, re.DOTALL | re.IGNORECASE)
        return {"yes": 1, "no": 2}.get(answers[-1].lower() if answers else "", 0)
    try:
        return {1.0: 1, 0.0: 2}.get(read_preference(reply, think=True), 0)
    except ReplyError:
        return 0


def reply_of(thought: str, verdict: int, medium: str, shows: str = "pair") -> str:
    """A whole reply."""
    said = ("Yes", "No")[verdict - 1] if shows == "one" else f"{medium} {verdict} is better"
    return f"<{TAGS[shows]}>{thought}</{TAGS[shows]}><answer>{said}</answer>"


def thought_of(first: str, second: str, medium: str) -> str:
    """A thought from what is said about each sample."""
    return f"{medium} 1: {first.strip()}. {medium} 2: {second.strip()}."
