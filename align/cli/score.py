"""The command ``alignflow score``: from arguments to rows, a table and an exit code."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.runs.devices import require
from alignflow.errors import ConfigError
from alignflow.secrets import shown
from alignflow.terminal import echo

if TYPE_CHECKING:
    from align.data.prompts import Prompt
    from rewards.base import RewardSettings

_NAMED = re.compile(r"([^\W\d][\w .-]*)=(.+)", re.DOTALL)
MOST = 20
"""Reasons that are printed one by one."""


def named_rewards(texts: Sequence[str]) -> dict[str, RewardSettings]:
    """Column -> settings of each ``--reward``: ``name=reward``, or a reward, which is called by its kind.

    Raises:
        ConfigError: two of one name, or as :func:`align.config.load.load_reward`.
    """
    from align.config.load import load_reward

    found: dict[str, RewardSettings] = {}
    for text in texts:
        match = _NAMED.fullmatch(text)
        settings = load_reward(match[2] if match else text)
        written = text.lstrip().startswith("{") or text.endswith((".yaml", ".yml"))
        name = match[1].strip() if match else str(getattr(settings, "kind", text)) if written else text
        if name in found or name in ("file", "prompt", "reasons"):
            raise ConfigError(f"--reward {text}: the column {name!r} is taken; give it a name: other={text}")
        found[name] = settings
    return found


def run(
    paths: Sequence[Path], rewards: Sequence[str], prompts: Sequence[Prompt], *, device: str, chunk: int,
    out: Path | None, as_json: bool, table: Callable[[list[str], list[list[str]]], str], cell: Callable[[Any], str],
) -> int:  # fmt: skip
    """Score, print and write; the exit code: 2 where a file could not be read, 1 if a reward scored nothing."""
    from align.evaluation.files import build, score_items
    from align.evaluation.score_items import items_of
    from align.evaluation.score_output import Output

    settings = named_rewards(rewards)
    place = device_of(device)
    items = items_of(paths, prompts, lambda line: echo(line, err=True))
    output = None if out is None else Output(out, list(settings))
    done = output.done if output is not None else set()
    todo = (item for item in items if (shown(item.name), item.prompt.text) not in done)
    total = max(len(items) - len(done), 0) if isinstance(items, list) else None
    ready = build(settings, place)
    if done:
        if comparing := [name for name, reward in ready.items() if reward.scope != "sample"]:
            raise ConfigError(f"{comparing[0]} compares samples, so {out} cannot be continued; choose another --out")
        echo(f"{out}: {len(done)} rows are there already", err=True)
    tally = Tally(list(settings), total, keep=output is None)
    try:
        for some in _chunks(score_items(todo, ready, place, chunk), chunk):
            if output is not None:
                output.add(some)
            tally.add(some)
    finally:
        tally.end()
        if output is not None:
            output.close()
    if output is None and as_json:
        echo(json.dumps([_kept(row) for row in tally.rows], indent=2, ensure_ascii=False))
    elif output is None:
        echo(table(["file", *settings], [[row["file"], *map(cell, row["scores"].values())] for row in tally.rows]))
    else:
        means = [[name, cell(tally.mean(name)), str(count)] for name, count in tally.scored.items()]
        echo(table(["reward", "mean", "scored"], means))
        echo(f"{tally.count} rows added to {out}")
    return tally.code(bool(done))


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """Columns of a row that are written."""
    return {name: value for name, value in row.items() if name != "unread" and (name != "parts" or value)}


def device_of(name: str) -> str:
    """The device that ``--device`` names; auto = a CUDA card if there is one."""
    if name == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(require(name, "--device"))


def _chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(rows)
    while some := list(islice(stream, size)):
        yield some


class Said:
    """Prints the first :data:`MOST` lines to stderr."""

    def __init__(self) -> None:
        self.told = 0

    def __call__(self, line: str) -> None:
        self.told += 1
        if self.told <= MOST:
            echo(line, err=True)
        elif self.told == MOST + 1:
            echo("further messages of this kind are left out", err=True)


class Tally:
    """Counts of scored samples for the end of the command, and a line of progress in a terminal.

    Args:
        total: samples to come, where that is known.
        keep: whether rows are kept for a table.
    """

    def __init__(self, names: Sequence[str], total: int | None, keep: bool) -> None:
        self.names, self.total, self.keep = names, total, keep
        self.rows: list[Any] = []
        self.count = self.unread = self.told = 0
        self.scored = dict.fromkeys(names, 0)
        self.sums = dict.fromkeys(names, 0.0)
        self.reason = dict.fromkeys(names, "")
        self.last = 0.0
        self.terminal = sys.stderr.isatty()

    def add(self, rows: Sequence[Any]) -> None:
        """Note rows; the first reasons are printed at once."""
        from align.evaluation.files import parts_of

        for row in rows:
            self.count += 1
            self.unread += bool(row["unread"])
            for name, value in {**row["scores"], **parts_of(row)}.items():
                self.scored[name] = self.scored.get(name, 0) + (value is not None)
                self.sums[name] = self.sums.get(name, 0.0) + (value or 0.0)
            self._tell(row)
        if self.keep:
            self.rows += rows
        if self.terminal and time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            of = f" of {self.total}" if self.total is not None else ""
            sys.stderr.write(f"\r\x1b[2Kscored {self.count}{of}, {self.unread} unreadable")
            sys.stderr.flush()

    def _tell(self, row: Any) -> None:
        lines = [f"{row['file']}: {row['unread']}"] if row["unread"] else []
        lines = lines or [f"{row['file']}: no {name} score: {why}" for name, why in row["reasons"].items()]
        for name, why in row["reasons"].items():
            self.reason[name] = self.reason[name] or why
        for line in lines:
            self.told += 1
            if self.told <= MOST:
                echo(line, err=True)

    def end(self) -> None:
        """Clear the line of progress."""
        if self.terminal and self.last:
            sys.stderr.write("\r\x1b[2K")
        if self.told > MOST:
            echo(f"and {self.told - MOST} more without a score", err=True)

    def mean(self, name: str) -> float | None:
        """Mean of a column's scores; None if there are none."""
        return self.sums[name] / self.scored[name] if self.scored[name] else None

    def code(self, resumed: bool) -> int:
        """The command's exit code."""
        silent = [name for name in self.names if not self.scored[name]] if self.count else []
        for name in silent if self.count > self.unread else []:
            echo(f"error: {name} scored nothing: {self.reason[name]}", err=True)
        if self.unread:
            echo(f"error: {self.unread} of {self.count} files could not be read", err=True)
            return 2
        return 1 if silent else 0
