"""The single error class of this package."""

from alignflow.errors import AlignflowError


class GeneratorError(AlignflowError, ValueError):
    """A generator cannot do this. The message names the problem, the place and the remedy."""
