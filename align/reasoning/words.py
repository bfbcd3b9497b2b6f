"""Questions to a judge that reasons, and the form of its replies. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rewards.judges.replies import ReplyError, read_preference, read_selection

QUESTION = (
    'Which shows "{prompt}" better, {medium} 1 or {medium} 2? Say what each shows inside <think> </think>, then '
    'conclude with "{medium} 1 is better" or "{medium} 2 is better" inside <answer> </answer>.'
)
QUESTION_ONE = (
    'Does this {medium} show "{prompt}"? Say what it shows inside <reason> </reason>, then conclude with '
    "<answer>Yes</answer> or <answer>No</answer>."
)
TAGS = {"pair": "think", "one": "reason"}
"""Samples in a question -> tag around the thought, as read by ``unified_reward`` and ``listener``."""


DIMENSIONS = (
    " Inside the answer also give a verdict for each of {names}, such as {first} = 1: the number of the better one, "
    "or 0 for a tie."
)
CHOOSE = (
    " You see {shown} of {count} frames. To see up to {more} others before you decide, write <recommend> </recommend> "
    "with the verdict so far in place of the answer, and then the numbers of the frames, <select>1, 2</select>."
)
HISTORY = "\nWhat you wrote so far:\n{thoughts}"


@dataclass(frozen=True)
class Written:
    """A written reply.

    Args:
        form: whether it is a thought with words and then an answer that is a verdict, and nothing else; or a thought, a
            verdict so far and numbers of frames.
        verdict: of a pair the place of the better sample, 1 or 2; of one sample 1 = yes, 2 = no; 0 if there is none.
        thought: the words before the answer, "" where the form is wrong.
        dimensions: verdict of each dimension, 0 = a tie, None if there is none.
        asked: frames that it asks for, as indices from 0.
    """

    form: bool
    verdict: int
    thought: str
    dimensions: tuple[int | None, ...] = ()
    asked: tuple[int, ...] = ()


def read_written(reply: str, shows: str = "pair", names: Sequence[str] = (), frames: int = 0) -> Written:
    """Form, verdict and thought of a reply. A verdict counts also where the form is wrong.

    >>> read_written("<think>two circles</think><answer>Image 2 is better</answer>")
    Written(form=True, verdict=2, thought='two circles', dimensions=(), asked=())
    >>> read_written("<reason>two circles</reason><answer>Yes</answer>", "one")
    Written(form=True, verdict=1, thought='two circles', dimensions=(), asked=())
    >>> read_written("Image 1 is better")
    Written(form=False, verdict=0, thought='', dimensions=(), asked=())

    Args:
        shows: pair or one.
        names: dimensions that the answer has to give a verdict for.
        frames: number of frames that the reply may ask for; 0 = it may not.
    """
    asked = _asked(reply, frames)
    place, tag = "recommend" if asked else "answer", TAGS[shows]
    said = (re.findall(rf"<{place}>(.*?)</{place}>", reply, re.DOTALL | re.IGNORECASE) or [""])[-1]
    verdict, dimensions = _verdict(said, shows), tuple(_dimension(said, name) for name in names)
    end = r"<select>[\d,\s]*</select>\s*" if asked else ""
    whole = rf"\s*<{tag}>(.*?)</{tag}>\s*<{place}>(.*?)</{place}>\s*{end}"
    found = re.fullmatch(whole, reply, re.DOTALL | re.IGNORECASE)
    complete = found and verdict and None not in dimensions
    thought = found[1].strip() if found and complete and f"<{tag}>" not in found[1] else ""
    return Written(bool(thought), verdict, thought, dimensions, asked)


def _asked(reply: str, frames: int) -> tuple[int, ...]:
    if not frames or "<answer>" in reply.lower():
        return ()
    try:
        return tuple(read_selection(reply, frames))
    except ReplyError:
        return ()


def _dimension(said: str, name: str) -> int | None:
    found = re.findall(rf"(?<!\w){re.escape(name)}\s*=\s*([012])\b", said, re.IGNORECASE)
    return int(found[-1]) if found else None


def _verdict(said: str, shows: str) -> int:
    if shows == "one":
        return {"yes": 1, "no": 2}.get(re.sub(r"^\W*|\W*$", "", said).lower(), 0)
    try:
        return {1.0: 1, 0.0: 2}.get(read_preference(said), 0)
    except ReplyError:
        return 0


def reply_of(
    thought: str, verdict: int, medium: str, shows: str = "pair", dimensions: Mapping[str, int | None] | None = None
) -> str:
    """A whole reply.

    >>> reply_of("a circle", 2, "Image", dimensions={"count": 0, "colour": None})
    '<think>a circle</think><answer>count = 0, Image 2 is better</answer>'
    """
    parts = [f"{name} = {value}" for name, value in (dimensions or {}).items() if value is not None]
    parts.append(("Yes", "No")[verdict - 1] if shows == "one" else f"{medium} {verdict} is better")
    return f"<{TAGS[shows]}>{thought}</{TAGS[shows]}><answer>{', '.join(parts)}</answer>"


def thought_of(first: str, second: str, medium: str) -> str:
    """A thought from what is said about each sample."""
    return f"{medium} 1: {first.strip()}. {medium} 2: {second.strip()}."
