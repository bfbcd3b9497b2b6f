"""Members of a sweep: one run for every combination of the alternatives, named and checked before the first starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.checking.commands import examine
from align.config.load import default_name, keys_of, load_settings, read_layers, resolved_settings
from align.config.roots import roots_of
from align.runs.identity import flatten
from align.sweeps.words import CONFIG, Axis
from alignflow import plugins
from alignflow.errors import ConfigError, Problem
from alignflow.words import count, listing

COMMANDS = ("train", "search")
"""Commands whose configs a sweep runs."""
LONGEST = 120
"""Characters of a member's name."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Args:
        name: of the run and of its folder in that of the sweep.
        files, overrides: of its config, as they were written.
        varied: key -> value of what distinguishes it, as a reader knows it; configs by their short names.
        command: ``train`` or ``search``; empty until it is checked.
        settings: resolved, by dotted key, without name and folder; empty until it is checked.
    """

    name: str
    files: tuple[str, ...]
    overrides: tuple[str, ...]
    varied: Mapping[str, str]
    command: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name that it shares with the members of other seeds: ``nft, train.lr 1e-4``."""
        told = [value if key == CONFIG else f"{key} {value}" for key, value in self.varied.items() if key != "seed"]
        return ", ".join(told) or default_name([Path(file) for file in self.files])

    def words(self, folder: Path) -> list[str]:
        """The words after ``alignflow`` that run it in the sweep's ``folder``."""
        out = json.dumps(str(folder / self.name), ensure_ascii=False)
        return [self.command, *self.files, *self.overrides, f"name={self.name}", f"out={out}"]


def members_of(axes: Sequence[Axis]) -> list[Member]:
    """A member for every combination, the last axis fastest; not checked yet."""
    short = _short_names(axes)
    found, taken = list[Member](), set[str]()
    for values in itertools.product(*(axis.values or ("",) for axis in axes)):
        pairs = list(zip(axes, values, strict=True))
        files = tuple(value for axis, value in pairs if axis.key == CONFIG)
        overrides = tuple(axis.word(value) if axis.values else axis.key for axis, value in pairs if axis.key != CONFIG)
        varied = {
            axis.key: short.get(value, value) if axis.key == CONFIG else value
            for axis, value in pairs
            if len(axis.values) > 1
        }
        name = _free(name_of(varied), taken)
        taken.add(name)
        found.append(Member(name, files, overrides, varied))
    return found


def _short_names(axes: Sequence[Axis]) -> dict[str, str]:
    """Config file -> its stem, with its folder where two stems are equal."""
    files = [value for axis in axes if axis.key == CONFIG for value in axis.values]
    stems = [Path(file).stem for file in files]
    return {
        file: stem if stems.count(stem) == 1 else default_name([Path(file)])
        for file, stem in zip(files, stems, strict=True)
    }


def name_of(varied: Mapping[str, str]) -> str:
    """Name of a run, which a folder may have, from what distinguishes it: ``shapes-nft-lr-1e-3-seed-0``.

    Args:
        varied: key -> value; the value of :data:`~align.sweeps.words.CONFIG` stands without its key.
    """
    last = [key.rpartition(".")[2] for key in varied]
    parts = []
    for key, value in varied.items():
        tail = key.rpartition(".")[2]
        parts += [*([] if key == CONFIG else [tail if last.count(tail) == 1 else key]), _slug(value)]
    text = "-".join(parts).strip(".-")
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text or "member"


def _slug(value: str) -> str:
    """A value in letters that a file name may have; a minus in front stays."""
    return ("-" if value.startswith("-") else "") + re.sub(r"[^\w.+-]+", "-", value).strip("-")


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where another member has it."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(one for one in names if one not in taken)


def checked(members: Sequence[Member], folder: Path) -> tuple[list[Member], list[str]]:
    """The members with command and resolved settings, and lines of ``alignflow check`` that a user should know.

    Raises:
        ConfigError: a member cannot run, or two are the same; every problem once, with the members that have it.
    """
    found, notes = list[Member](), dict[str, None]()
    wrong: dict[Problem, list[str]] = {}
    for member in members:
        try:
            one, lines = _checked(member, folder)
        except ConfigError as error:
            for problem in error.problems:
                wrong.setdefault(problem, []).append(member.name)
            continue
        found.append(one)
        notes |= dict.fromkeys(lines)
    if wrong:
        raise ConfigError([_told(problem, names, len(members)) for problem, names in wrong.items()], "the sweep")
    _check_different(found)
    return found, list(notes)


def _checked(member: Member, folder: Path) -> tuple[Member, list[str]]:
    files = [Path(file) for file in member.files]
    root = roots_of(keys_of(read_layers(files)))[0]
    if root.command not in COMMANDS:
        raise ConfigError(
            f"{' + '.join(member.files)} is for alignflow {root.command}; a sweep runs training and searches"
        )
    words = Member(member.name, member.files, member.overrides, member.varied, root.command).words(folder)
    overrides = words[1 + len(files) :]
    lines = [line for line in examine(files, overrides) if line.startswith(("note ", "unknown "))]
    with plugins.unread():
        settings = resolved_settings(load_settings(files, overrides, root))
    kept = {key: value for key, value in settings.items() if key not in ("name", "out")}
    return Member(member.name, member.files, member.overrides, member.varied, root.command, flatten(kept)), lines


def _told(problem: Problem, names: Sequence[str], total: int) -> Problem:
    if len(names) == total:
        return problem
    return Problem(problem.path, f"{problem.message} (in {count(len(names), 'run')}: {listing(names)})", problem.place)


def _check_different(members: Sequence[Member]) -> None:
    known: dict[str, Member] = {}
    for member in members:
        same = known.setdefault(json.dumps([member.command, member.settings], sort_keys=True, default=str), member)
        if same is not member:
            raise ConfigError(
                f"the sweep has the same run twice: {_varied(same)} and {_varied(member)} give equal settings; "
                "remove one of them"
            )


def _varied(member: Member) -> str:
    return " ".join(f"{key}={value}" for key, value in member.varied.items())
