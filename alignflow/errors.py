"""Hierarchy of user errors. Each message names the place and the remedy.

The command line prints these as ``error: ...`` without a traceback and leaves with ``exit_code``:
2 where the request was wrong, 1 if the run failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from alignflow.secrets import redact, shown
from alignflow.text import printable


class AlignflowError(Exception):
    """Base of everything that is explained to the user instead of traced."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))


class EarlyExit(Exception):  # noqa: N818 - not an error
    """Base of what ends a call early and is always caught by the code that made the call; a user never sees it."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config.

    Args:
        path: dotted path of the setting, ``train.lr``; empty for the file as a whole.
        message: what is wrong, what is allowed.
        place: where it was written, ``file.yaml:12`` or the override; empty when unknown.
    """

    path: str
    message: str
    place: str = ""

    def __str__(self) -> str:
        path, place, message = (printable(redact(text), 4000) for text in (self.path, self.place, self.message))
        where = f"{path} ({place})" if path and place else path or place
        return f"{where}: {message}" if where else message


class ConfigError(AlignflowError, ValueError):
    """A config that cannot be run; holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | str, source: str = "") -> None:
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        self.source = source
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            head = f"{len(lines)} problems" + (f" in {source}" if source else "")
            lines = [head, *(f"  {line}" for line in lines)]
        Exception.__init__(self, "\n".join(lines))  # shown already; "password: should be ..." is no password


class DataError(AlignflowError, ValueError):
    """Prompts, pairs or images that cannot be read; names the file and, where there is one, the line."""

    exit_code = 2


class RunFolderError(AlignflowError, ValueError):
    """A run folder that is in the way, missing or not a run folder."""

    exit_code = 2


class CheckpointError(AlignflowError, ValueError):
    """A checkpoint that is missing, incomplete or belongs to other settings."""


class TrainingError(AlignflowError, RuntimeError):
    """A run that cannot continue; its last checkpoint stays."""


class SearchError(AlignflowError, RuntimeError):
    """A search that cannot run, or that found nothing; the message gives the reason."""
