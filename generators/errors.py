"""The single error class of this package."""

from alignflow.secrets import shown


class GeneratorError(ValueError):
    """A generator cannot do what was asked; the message says what, where and what to do instead."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))
