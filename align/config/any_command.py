"""The config of a command with several config classes. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from align.config.load import Files, keys_of, load_settings, read_layers
from align.config.roots import roots, roots_of
from alignflow.settings import RunSettings


def load_for(command: str, path: Files, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a config of a command with several config classes; the keys of the files select the class.

    Raises:
        ConfigError: as :func:`align.config.load.load_config`; also if the config is for another command.
    """
    likely = roots_of(keys_of(read_layers(path)))
    root = next(root for root in (*likely, *roots()) if root.command == command)
    return load_settings(path, overrides, root)
