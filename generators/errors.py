"""The one error of this package."""


class GeneratorError(ValueError):
    """A generator cannot do what was asked; the message says what, where and what to do instead."""
