"""Text to and from a judge: templates, spellings of an answer, parsed replies. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignflow.errors import AlignflowError

NUMBER = r"(-?\d+(?:\.\d+)?)"
YES_NO = (("Yes",), ("No",))


class ReplyError(AlignflowError, ValueError):
    """A written reply without the requested content; the message quotes its beginning."""

    def __init__(self, what: str, reply: str) -> None:
        super().__init__(f"the judge's reply has no {what}: {reply.strip()[:80]!r}")


def fill(template: str, **values: object) -> str:
    """``{name}`` -> value, for the names given; other braces, and those in values, stay as they are.

    >>> fill("{a} {b} {c}", a="{b}", b=1)
    '{b} 1 {c}'
    """
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), template)


def spellings(words: Sequence[str]) -> tuple[str, ...]:
    """The ways a model may begin an answer: as given, in lower, upper and title case, each also after a space.

    >>> spellings(["Yes"])
    ('Yes', ' Yes', 'yes', ' yes', 'YES', ' YES')
    """
    cases = [case for word in words for case in (word, word.lower(), word.upper(), word.capitalize())]
    return tuple(f"{space}{case}" for case in dict.fromkeys(cases) for space in ("", " "))


def read_score(reply: str, label: str, lowest: float, highest: float) -> float:
    """The number after the last ``label``, such as "Final Score:".

    Raises:
        ReplyError: none, or one beyond lowest .. highest.
    """
    found = re.findall(rf"{re.escape(label)}[\s*]*{NUMBER}", reply, re.IGNORECASE)
    return _within(found[-1:], f"number after {label!r}", reply, lowest, highest)


def read_answer(reply: str, lowest: float, highest: float) -> float:
    """The number inside the last ``<answer>`` that is closed, of which it must be all but ``/highest``.

    Raises:
        ReplyError: none, or one beyond lowest .. highest.
    """
    found = re.findall(rf"<answer>\s*{NUMBER}\s*(?:/\s*{highest:g}\s*)?</answer>", reply, re.IGNORECASE)
    return _within(found[-1:], "<answer>number</answer>", reply, lowest, highest)


def read_preference(reply: str, think: bool = False) -> float:
    """UnifiedReward's verdict: 1 for "Image 1 is better", 0 for "Image 2 is better", 1/2 for "equally good".

    Args:
        think: whether it must be in ``<answer>...</answer>``, after the thoughts.

    Raises:
        ReplyError: no verdict, or several that contradict each other.
    """
    text = reply
    if think:
        text = (re.findall(r"<answer>(.*?)</answer>", reply, re.DOTALL | re.IGNORECASE) or [""])[-1]
    found = {int(number) for number in re.findall(r"(?:image|video) ([12]) is better", text, re.IGNORECASE)}
    found |= {0} if re.search(r"(?:images|videos) are equally good", text, re.IGNORECASE) else set()
    if len(found) != 1:
        raise ReplyError("verdict", reply)
    return {0: 0.5, 1: 1.0, 2: 0.0}[found.pop()]


def read_reasons(reply: str) -> tuple[str, bool]:
    """Text of the last ``<reason>``, and whether the last ``<answer>`` is yes.

    Raises:
        ReplyError: no reasons, or neither yes nor no.
    """
    reasons = re.findall(r"<reason>(.*?)</reason>", reply, re.DOTALL | re.IGNORECASE)
    answers = re.findall(r"<answer>\W*(.*?)\W*</answer>", reply, re.DOTALL | re.IGNORECASE)
    if not reasons or not reasons[-1].strip():
        raise ReplyError("<reason> with words in it", reply)
    if not answers or answers[-1].lower() not in ("yes", "no"):
        raise ReplyError("<answer>yes</answer> or <answer>no</answer>", reply)
    return reasons[-1].strip(), answers[-1].lower() == "yes"


def read_rubric(reply: str, names: Sequence[str], lowest: float, highest: float) -> list[float]:
    """The number after every ``name:``, in the order of ``names``.

    Raises:
        ReplyError: one is missing, or beyond lowest .. highest.
    """
    found = [re.findall(rf"^\W*{re.escape(name)}\W*:[\s*]*{NUMBER}", reply, re.I | re.M) for name in names]
    return [
        _within(numbers[-1:], f"number after {name!r}", reply, lowest, highest)
        for name, numbers in zip(names, found, strict=True)
    ]


def read_fakeness(reply: str) -> tuple[bool, tuple[float, ...] | None, float | None]:
    """Verdict and grounding in both of DeeptraceReward's formats (arXiv 2509.22646): tags, and whole sentences.

    >>> read_fakeness("FAKE <coordinates>[1, 2, 30, 40]</coordinates> <start_time>0.5</start_time>")
    (True, (1.0, 2.0, 30.0, 40.0), 0.5)
    >>> read_fakeness("REAL. The video is real.")
    (False, None, None)

    Returns:
        whether it begins with FAKE, the corners x0, y0, x1, y1 and the second the trace begins at, None if not said.

    Raises:
        ReplyError: it begins with neither REAL nor FAKE.
    """
    verdict = re.match(r"\W*(real|fake)\b", reply, re.IGNORECASE)
    if not verdict:
        raise ReplyError("REAL or FAKE at its beginning", reply)
    corners = re.search(rf"\[\s*{NUMBER}\s*,\s*{NUMBER}\s*,\s*{NUMBER}\s*,\s*{NUMBER}\s*\]", reply)
    start = re.search(rf"(?:<start_time>\s*|\bstarting\s+(?:at\s+)?){NUMBER}", reply, re.IGNORECASE)
    box = tuple(float(number) for number in corners.groups()) if corners else None
    return verdict[1].lower() == "fake", box, float(start[1]) if start else None


def read_selection(reply: str, count: int) -> list[int]:
    """Frames asked for in ``<select>3, 7</select>``, as indices from 0; [] where none is asked for.

    Raises:
        ReplyError: what is asked for holds no number of 1 .. count.
    """
    found = re.findall(r"<select>(.*?)</select>", reply, re.DOTALL | re.IGNORECASE)
    if not found:
        return []
    chosen = [int(number) - 1 for number in re.findall(r"\d+", found[-1])]
    kept = [index for index in dict.fromkeys(chosen) if 0 <= index < count]
    if not kept:
        raise ReplyError(f"frame of 1 to {count} in <select>", reply)
    return kept


def _within(found: Sequence[str], what: str, reply: str, lowest: float, highest: float) -> float:
    if not found or not lowest <= float(found[0]) <= highest:
        raise ReplyError(f"{what} of {lowest:g} to {highest:g}", reply)
    return float(found[0])
