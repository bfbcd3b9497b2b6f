"""Words of a sweep: alternatives stand between commas, in configs and in values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config.command_line import SUFFIXES, files_and_overrides
from alignflow.errors import ConfigError, Problem
from alignflow.paths import is_file

CONFIG = "config"
"""Key of an axis whose values are config files."""
SET_BY_SWEEP = ("name", "out")
OPENING, CLOSING = "[{", "]}"


@dataclass(frozen=True)
class Axis:
    """A config or a setting with its alternatives, as they were written; one alternative is not varied.

    Args:
        key: dotted path of the setting, ``train.lr``; :data:`CONFIG` for config files.
    """

    key: str
    values: tuple[str, ...]

    def word(self, value: str) -> str:
        """One alternative as a word of a command line."""
        return value if self.key == CONFIG else f"{self.key}={value}"


def axes_of(first: str | Path, words: Sequence[str] | None) -> list[Axis]:
    """The configs, then the overrides, each in the order of the command line.

    Args:
        first: the first word, one config or several with commas between.
        words: the words after it.

    Raises:
        ConfigError: an alternative is empty, a key is varied twice or set by the sweep, or nothing is varied.
    """
    files, overrides = files_and_overrides(first, words)
    axes = [Axis(CONFIG, _alternatives(str(file))) for file in files]
    problems: list[Problem] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key, place = key.strip(), f"override {text!r:.300}"
        values = split(value) if equals else []
        if len(values) > 1 and not all(values):
            problems.append(Problem(key, "a value is empty: separate values by commas, as in 1e-4,3e-4", place))
        elif key in SET_BY_SWEEP:
            problems.append(
                Problem(key, "is set by the sweep for each of its runs; --out names the sweep's folder", place)
            )
        elif len(values) > 1 and any(one.key == key and len(one.values) > 1 for one in axes):
            problems.append(Problem(key, "is varied twice; write all its values once, with commas between", place))
        axes.append(Axis(key, tuple(values)) if equals else Axis(text, ()))
    if problems:
        raise ConfigError(problems)
    if all(len(axis.values) < 2 for axis in axes):
        raise ConfigError(
            "nothing is varied: give a setting several values, such as seed=0,1,2 (a list in brackets is one value: "
            "train.betas=[0.9,0.99]); for one run use alignflow train or alignflow search"
        )
    return axes


def _alternatives(file: str) -> tuple[str, ...]:
    """The files of ``a.yaml,b.yaml``; a file whose own name has a comma is one."""
    parts = file.split(",")
    if len(parts) == 1 or is_file(Path(file)):
        return (file,)
    if wrong := [part for part in parts if not part.lower().endswith(SUFFIXES)]:
        raise ConfigError(f"{file}: configs with commas between end in .yaml or .yml, and {wrong[0]!r} does not")
    return tuple(parts)


def split(text: str) -> list[str]:
    """The parts of a text between the commas that stand outside brackets, braces and quotes.

    A quote is one only where a YAML value can begin, so ``it's,that's`` has two parts.
    """
    parts, start, depth, quote, before, place = [], 0, 0, "", ",", 0
    while place < len(text):
        letter = text[place]
        if quote:
            if (quote == '"' and letter == "\\") or (quote == "'" and text[place : place + 2] == "''"):
                place += 1
            elif letter == quote:
                quote = ""
        elif letter in "'\"" and before in ",:" + OPENING:
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth = max(0, depth - 1)
        elif letter == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
        before = letter if not letter.isspace() else before
        place += 1
    return [part.strip() for part in (*parts, text[start:])]
