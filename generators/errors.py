"""The single error class of this package."""

from alignflow.errors import AlignflowError


class GeneratorError(AlignflowError, ValueError):
    """A generator cannot do this. The message says what, where, and what to do instead."""
