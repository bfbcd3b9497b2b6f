"""Split of a command line's words into config files and overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignflow.errors import ConfigError
from alignflow.paths import exists

SUFFIXES = (".yaml", ".yml")


def files_and_overrides(first: str | Path, words: Sequence[str] | None) -> tuple[list[Path], list[str]]:
    """(config files, overrides), each in the order of the command line.

    The first word of ``a.yaml b.yaml train.lr=1e-4`` is a config, whatever its name. Of the other words, those that
    end in ``.yaml`` or ``.yml`` and hold no ``=`` are configs, and the rest are overrides.

    Args:
        first: the first word.
        words: the words after it.

    Raises:
        ConfigError: an override is before a config file.
    """
    words = list(words or ())
    if "=" in str(first) and not exists(first):
        raise ConfigError(f"{first} is an override, and config files come first: CONFIG.yaml {first}")
    files, overrides = [Path(first)], []
    for word in words:
        if "=" in word or not word.lower().endswith(SUFFIXES):
            overrides.append(word)
        elif overrides:
            written = " ".join([*map(str, files), word, *overrides])
            raise ConfigError(f"{word} comes after the override {overrides[-1]}; config files come first: {written}")
        else:
            files.append(Path(word))
    return files, overrides
