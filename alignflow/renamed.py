"""Names that changed. An old command, option, setting or environment variable is an error that gives the new name.

A settings class lists its own old names in ``renamed``; see :class:`alignflow.strict.Strict`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from alignflow.errors import ConfigError

COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("reward", "latent"): ("reward", "train"),
    ("reward", "judge"): ("reward", "train"),
}
"""Old command -> new command."""
OPTIONS = {
    ("score",): {"--batch": "--chunk"},
    ("reward", "serve"): {"--batch": "--chunk"},
    ("evaluate",): {"--best": "--checkpoint best"},
    ("export",): {"--best": "--checkpoint best"},
}
"""Command -> old option -> new option."""
VARIABLES = {
    "ALIGNFLOW_PICTURE_PIXELS": "ALIGNFLOW_IMAGE_PIXELS",
    "ALIGNFLOW_CLIP_PIXELS": "ALIGNFLOW_VIDEO_PIXELS",
}
"""Old environment variable -> new one."""


def check_words(words: Sequence[str]) -> None:
    """Raise ConfigError if the words of a command line use an old command or option."""
    if new := COMMANDS.get(tuple(words[:2])):
        written = " ".join(["alignflow", *new, *words[2:]])
        raise ConfigError(f"alignflow {' '.join(words[:2])} is now alignflow {' '.join(new)}: {written}")
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == "--set" or word.startswith("--set="):
            override = word.partition("=")[2] or following or "KEY=VALUE"
            raise ConfigError(f"overrides are written without --set: {override}")
    given = {word.partition("=")[0] for word in words}
    for command, options in OPTIONS.items():
        for old in given & options.keys() if tuple(words[: len(command)]) == command else ():
            raise ConfigError(f"the option {old} of alignflow {' '.join(command)} is now {options[old]}")


def new_name(settings: type, key: str) -> str | None:
    """The new name of the setting that a class once called ``key``; None if it never had such a setting."""
    tables = (vars(cls).get("renamed", {}) for cls in settings.__mro__)
    return next((table[key] for table in tables if key in table), None)


def variable(name: str, default: str = "") -> str:
    """The value of the environment variable ``name``; raises ConfigError if one of its old names is set."""
    for old, new in VARIABLES.items():
        if new == name and old in os.environ:
            raise ConfigError(f"the environment variable {old} is now {new}; unset {old}")
    return os.environ.get(name, default)
