"""The config classes of all commands, and the command that a config is for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Set

from alignflow.errors import ConfigError
from alignflow.settings import RunSettings

PLACES = {
    "align.config.settings": ("Config",),
    "align.search.settings": ("SearchConfig",),
    "align.preference.settings": ("RewardTrainConfig", "JudgeTrainConfig", "LatentTrainConfig"),
    "align.reasoning.settings": ("ReasonConfig",),
    "align.rewriting.settings": ("EvolveConfig", "RewriterConfig"),
    "align.rewriting.joint_settings": ("JointConfig",),
}
"""Module -> its config classes. They are imported when needed, because these modules read configs themselves."""


def roots() -> tuple[type[RunSettings], ...]:
    """The config classes of all commands."""
    return tuple(getattr(importlib.import_module(module), name) for module, names in PLACES.items() for name in names)


def roots_of(keys: Iterable[str]) -> list[type[RunSettings]]:
    """The config classes that have most of a config's ``keys``; several if the keys do not decide."""
    known = {root: len(set(keys) & set(root.model_fields)) for root in roots()}
    return [root for root, count in known.items() if count == max(known.values())]


def check_command(files: Mapping[str, Set[str]], keys: Set[str], root: type[RunSettings]) -> None:
    """Raise ConfigError if the config is for another command than ``root``, or its files are for different commands.

    Args:
        files: name of each file -> keys of its settings and of those that it extends.
        keys: those of all files and overrides.
    """
    meant = roots_of(keys)
    each = {file: roots_of(own) for file, own in files.items()}
    if not set.intersection(*map(set, each.values())):
        said = ", ".join(f"{file} for {_said(found[0])}" for file, found in each.items())
        raise ConfigError(f"these configs are for different kinds of run and cannot be merged: {said}")
    if root.command not in {other.command for other in meant}:
        is_a = "is a config" if len(files) == 1 else "are configs"
        names = " + ".join(files)
        raise ConfigError(f"{names} {is_a} for alignflow {meant[0].command}, not for alignflow {root.command}")


def _said(root: type[RunSettings]) -> str:
    """``alignflow reward train (a judge)``."""
    return f"alignflow {root.command}" + (f" ({root.trains})" if root.trains else "")
