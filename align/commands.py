"""The configs of every command: which one a file is for, and what ``check`` says of it. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from align import check
from align.config import load_settings, read_layers
from align.errors import ConfigError
from align.preference import settings as preferences
from align.search import settings as searches
from align.settings import Config
from align.tree import RunSettings

CONFIGS: dict[str, type[RunSettings]] = {
    config.command: config
    for config in (
        Config,
        searches.SearchConfig,
        preferences.RewardTrainConfig,
        preferences.JudgeTrainConfig,
        preferences.LatentTrainConfig,
    )
}
"""Command -> the tree of its settings."""


def commands_of(keys: Iterable[str]) -> list[str]:
    """The commands whose settings hold most of a config's ``keys``; several where the keys do not tell."""
    known = {command: len(set(keys) & set(config.model_fields)) for command, config in CONFIGS.items()}
    return [command for command, count in known.items() if count == max(known.values())]


def examine(path: Path, overrides: Sequence[str] = (), memory: bool = False, card: str | None = None) -> Iterator[str]:
    """Lines on a config of any command, for ``check``.

    Args:
        memory: with an estimate of what a training run needs; ``card`` as ``24gb``.

    Raises:
        ConfigError: what is wrong with it, or memory asked of what is no training run; nothing was run.
    """
    command = commands_of({key for layer in read_layers(path) for key in layer.data})[0]
    if memory and command != Config.command:
        raise ConfigError(f"--memory and --card are for training runs; {path} is a config for alignflow {command}")
    config = load_settings(path, overrides, CONFIGS[command])
    if isinstance(config, Config):
        yield from map(line, check.essentials(config))
        if memory:
            from align import estimate

            yield from estimate.lines(config, card)
        check.check_files(config)
    elif isinstance(config, searches.SearchConfig):
        yield from map(line, searches.essentials(config))
        searches.check_files(config)
    else:
        yield from map(line, preferences.essentials(config))
        preferences.check_files(config)


def line(named: tuple[str, str]) -> str:
    """``prompts    shapes:train``."""
    return f"{named[0]:10} {named[1]}"
