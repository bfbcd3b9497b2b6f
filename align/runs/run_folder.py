"""The folder of a run: locked by one process, created, resumed, written to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from align.data.files import new_folder, write_json, write_text, writing
from align.runs import metrics, owned
from align.runs.environment import environment
from align.runs.identity import (
    FREE_IN_A_REASONER,
    FREE_IN_A_REWRITER,
    FREE_IN_A_SEARCH,
    FREE_IN_AN_EVOLUTION,
    FREE_ON_RESUME,
    MEMORY_ALONE,
    changes,
    flatten,
    refused,
    under,
)
from align.runs.lock import Lock
from align.runs.manifest import list_steps
from align.runs.per_prompt import forget_scores
from alignflow.errors import ConfigError, RunFolderError

__all__ = ["FREE_ON_RESUME", "MEMORY_ALONE", "RunFolder", "flatten"]

_INSIDE = {
    owned.TRAINING: ("checkpoints", "samples", "lora", "prompts", "held_out"),
    owned.SEARCH: ("candidates", "samples"),
    owned.EVOLUTION: ("evolved",),
    owned.REWRITER: ("collected",),
    owned.JOINT: ("stages",),
    owned.REASONER: ("collected",),
}
_COMMANDS = {
    owned.TRAINING: "train",
    owned.SEARCH: "search",
    owned.EVOLUTION: "prompts evolve",
    owned.REWRITER: "prompts train",
    owned.JOINT: "prompts joint",
    owned.REASONER: "reward reason",
}
_FREE = {
    owned.TRAINING: (*FREE_ON_RESUME, *MEMORY_ALONE),
    owned.SEARCH: FREE_IN_A_SEARCH,
    owned.EVOLUTION: FREE_IN_AN_EVOLUTION,
    owned.REWRITER: FREE_IN_A_REWRITER,
    owned.JOINT: ("name", "out", "rounds"),
    owned.REASONER: FREE_IN_A_REASONER,
}
"""Kind of folder -> settings that may change when it is resumed."""


class Part(NamedTuple):
    """One part of a run, from a start to a stop.

    Args:
        before: settings the run had until now, where it was there.
        changed: dotted key -> [then, now] of what this part changes.
        asked: whether it was asked to continue with what is there.
    """

    before: dict[str, Any] | None = None
    changed: Mapping[str, list[Any]] = MappingProxyType({})
    asked: bool = False


class RunFolder:
    """Paths and logs of one run. Only the main process writes.

    Args:
        path: the folder.
        writes: whether this process is the one that writes.
        kind: kind of folder, such as :data:`align.runs.owned.TRAINING` or :data:`align.runs.owned.SEARCH`.
    """

    def __init__(self, path: Path, writes: bool = True, kind: str = owned.TRAINING) -> None:
        self.path, self.writes, self.kind = path, writes, kind
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.take(Part())
        self.id: str | None = None
        """Id that distinguishes this run from all others; None if an older version made the run."""
        self._replaces = False
        self._made: list[Path] = []
        self._lock: Lock | None = None
        self._resolved, self._content = "", dict[str, str]()

    # -- taking it ----------------------------------------------------------------------------------------------

    def enter(self, resolved: str, *, resume: bool, overwrite: bool) -> Part:
        """Check that the run may start here, and take the folder: until :meth:`leave` no other process may.

        In the main process alone; :meth:`take` gives what it found to the others.

        Args:
            resolved: the run's config, as :func:`align.config.load.dump_config` writes it.

        Raises:
            RunFolderError: the folder is there and neither was asked for, or is not such a run, or another process
                uses it, or its settings differ in what cannot change.
        """
        before, changed = None, dict[str, list[Any]]()
        if resume and overwrite:
            raise RunFolderError("--resume continues a run and --overwrite deletes it: give one of the two")
        with writing(self.path):
            self._check(resume, overwrite)
            self._made = [place for place in (self.path, *self.path.parents) if not place.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path / owned.LOCK, self.path)
            try:
                self._lock.take()
                there = self._check(resume, overwrite)  # again: another run may just have been made, or finished
                self._replaces = overwrite and there
                if resume and there:
                    before, changed = self._compared(resolved)
            except BaseException:
                self.leave()
                raise
        self.take(Part(before, changed, resume))
        return Part(before, changed, resume)

    def take(self, part: Part) -> None:
        """Know which part of the run this is."""
        self.before, self.changed, self.asked = part.before, part.changed, part.asked

    @contextmanager
    def held(self, resolved: str, *, resume: bool, overwrite: bool) -> Iterator[Self]:
        """:meth:`enter`, and :meth:`leave` at the end of the block; for commands that run in one process.

        The block calls :meth:`check_content` before it loads models, and :meth:`begin` once everything is loaded.
        """
        self._resolved = resolved
        try:
            self.enter(resolved, resume=resume, overwrite=overwrite)
            yield self
        finally:
            self.leave()

    def begin(self) -> None:
        """:meth:`create` the run of a block of :meth:`held`; digests of :meth:`check_content` are in its mark."""
        self.create(self._resolved, environment(torch_too=True), **self._content)

    def leave(self) -> None:
        """Let others use the folder; one that was made for a run which never began goes."""
        if self._lock is not None:
            self._lock.release()
        for place in self._made:
            try:
                place.rmdir()
            except OSError:
                break
        self._made = []

    def _check(self, resume: bool, overwrite: bool) -> bool:
        """Whether the folder has a run; raises RunFolderError if none may start."""
        path = self.path
        if path.is_symlink() and not path.exists():
            raise RunFolderError(f"{path} is a link to {os.readlink(path)}, which is not there")
        if not path.exists():
            return False
        if not path.is_dir():
            raise RunFolderError(f"{path} exists and is not a folder; choose another name with --out")
        if not self._is_run():
            return False
        if overwrite:
            owned.check_removable(path, self.kind)
        elif not resume:
            raise RunFolderError(
                f"run folder {path} exists; add --resume to continue, --overwrite to start again, or --out DIR to keep "
                "both"
            )
        return True

    def check_content(self, **digests: str) -> None:
        """Raise RunFolderError if the mark of a resumed run holds another digest by one of these names."""
        self._content = digests
        mark = owned.read_mark(self.path) if self.before is not None else {}
        data, model = ("data", "judge.model") if self.kind == owned.REASONER else ("prompts", "generator.path")
        for name, key in (("data", data), ("model", model)):
            moved = any(under(changed, [key]) for changed in self.changed)
            if (name in mark and mark[name] != digests[name]) or (name not in mark and moved):
                raise RunFolderError(
                    f"{self.path} was made with other content of {key}; restore it, or start another with --out"
                )

    def _is_run(self) -> bool:
        """Whether the folder holds a run of this kind; False for an empty one, and one that was never quite made."""
        held = owned.entries(self.path)
        inside = _INSIDE[self.kind][0]
        began = {owned.MARK, inside}
        empty = not (inside in held and any((self.path / inside).iterdir()))
        made = {"config.yaml", "environment.json"} <= held
        if not held or (held & began and held <= {*began, "config.yaml", "environment.json"} and empty and not made):
            return False
        found = owned.read_mark(self.path)
        if found.get("kind") == self.kind and made:
            return True
        is_not = f"is a {found['kind']}, not a {self.kind}" if found else "exists and is not a run folder"
        raise RunFolderError(f"{self.path} {is_not}; choose another with --out")

    def _compared(self, resolved: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        before, now = self._settings(), _parsed(resolved)
        changed = changes(before, now)
        if wrong := refused(changed, _FREE[self.kind]):
            raise RunFolderError(
                f"{self.path} was made with other settings, so it cannot be continued exactly:\n  "
                + "\n  ".join(wrong)
                + "\n  give the same value as before, or start another run with --out"
            )
        return before, changed

    def _settings(self) -> dict[str, Any]:
        """Settings of the run; those that its version did not have get their defaults.

        Raises:
            RunFolderError: settings were renamed or removed since then.
        """
        from align.config.any_command import load_for
        from align.config.load import dump_config

        path = self.path / "config.yaml"
        try:
            return _parsed(dump_config(load_for(_COMMANDS[self.kind], path)))
        except ConfigError as error:
            said = "\n  ".join(map(str, error.problems))
            raise RunFolderError(f"{path} is not valid in this version; correct it, then --resume:\n  {said}") from None

    # -- making it ----------------------------------------------------------------------------------------------

    def create(self, resolved: str, environment: dict[str, Any], **about: Any) -> str | None:
        """Make the folder, or sweep what an interrupted write left in it, and write the resolved config.

        A folder that is replaced goes when the new one is whole. ``about`` is in the mark of a new folder. Returns
        the run's id.
        """
        with writing(self.path):
            if self._replaces:
                with new_folder(self.path, replaces=True) as staging:
                    self._fill(staging, resolved, environment, about)
                    if self._lock is not None:
                        self._lock.copy_to(staging)
            else:
                for folder in (self.path, *(self.path / name for name in _INSIDE[self.kind])):
                    owned.sweep(folder)
                self._note_changes()
                self._fill(self.path, resolved, environment, about)
            owned.sweep(self.path.resolve().parent, self.path.name)
        self._made = []
        self.id = owned.read_mark(self.path).get("id")
        return self.id

    def _note_changes(self) -> None:
        """A row with the changes of this part, before the old config is overwritten."""
        if self.changed and self.kind == owned.TRAINING:
            row = {"event": "resumed", "step": (list_steps(self.checkpoints) or [0])[-1], "changed": self.changed}
            if self.rows()[-1:] != [row]:
                metrics.append(self.metrics, row, durable=True)

    def _fill(self, folder: Path, resolved: str, environment: dict[str, Any], about: dict[str, Any]) -> None:
        """The mark comes first and the environment last: so an unfinished folder is known as such."""
        if self.before is None:
            owned.mark(folder, self.kind, **about)
        (folder / _INSIDE[self.kind][0]).mkdir(exist_ok=True)
        write_text(folder / "config.yaml", resolved)
        write_json(folder / "environment.json", environment)

    # -- its rows -----------------------------------------------------------------------------------------------

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to ``metrics.jsonl``."""
        if self.writes:
            metrics.append(self.metrics, row)

    def sync(self) -> None:
        """Put the rows on the disk, before a checkpoint that counts them."""
        if self.writes:
            metrics.sync(self.metrics)

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows of ``metrics.jsonl``."""
        return metrics.read(self.metrics)[0]

    def forget_after(self, step: int) -> int:
        """Drop rows that a resumed run writes again, those after ``step``; returns how many lines were unreadable."""
        if not self.writes:
            return 0
        forget_scores(self.path, step)
        return metrics.keep_until(self.metrics, step)


def _parsed(text: str) -> dict[str, Any]:
    from ruamel.yaml import YAML

    found: Any = YAML(typ="safe", pure=True).load(text)
    return dict(found)
