"""The error that this package raises, and the exception by which it leaves a pipeline early."""

from __future__ import annotations

from alignflow.errors import AlignflowError, EarlyExit


class GeneratorError(AlignflowError, ValueError):
    """A generator cannot do this. The message names the problem, the place and the remedy."""


class LengthsKnown(EarlyExit):
    """Ends :meth:`generators.base.Generator.encode_text` once the prompts' lengths are known.

    Args:
        found: index of a prompt that is too long -> the words that would be cut.
    """

    def __init__(self, found: dict[int, str]) -> None:
        self.found = found
