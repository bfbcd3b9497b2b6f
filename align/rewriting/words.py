"""Instructions to a rewriter, and the reading of its replies. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

REWRITE = "Rewrite this prompt so that an image generator follows it better. Reply with the new prompt only.\n{prompt}"
EVOLVE = (
    "Rewrite this prompt so that an image generator follows it better. Reply with the new prompt only.\n{prompt}\n"
    "Earlier rewrites and their scores, the best last:\n{history}"
)


def instruction(template: str, prompt: str, **values: str) -> str:
    """The template with ``{prompt}`` and ``values`` in it; braces in these are plain characters."""
    for name, value in {"prompt": prompt, **values}.items():
        template = template.replace("{" + name + "}", value.replace("{", "\0"))
    return template.replace("\0", "{")


def history(earlier: Sequence[tuple[str, float]]) -> str:
    """A line for each rewrite, its score first, in the order given."""
    return "\n".join(f"{score:.3g} {text}" for text, score in earlier)


def rouge_l(text: str, wanted: str) -> float:
    """ROUGE-L (Lin, 2004) of two texts, 0 to 1: the F-measure of their longest common subsequence of words.

    Words are runs of letters and digits in lower case; 0 if a text has none.
    """
    first, second = (re.findall(r"\w+", one.lower()) for one in (text, wanted))
    lengths = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            above = lengths[place]
            lengths[place] = before + 1 if word == other else max(above, lengths[place - 1])
            before = above
    return 2 * lengths[-1] / max(len(first) + len(second), 1)


def cleaned(reply: str) -> str:
    """The rewrite in a reply: its first line that is not empty, without quotes around it; "" if there is none."""
    lines = (line.strip() for line in reply.splitlines())
    line = next((line for line in lines if line), "")
    if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'`":
        line = line[1:-1].strip()
    return line
