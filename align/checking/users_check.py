"""Problems of users and their embeddings, found before anything is loaded. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.data.prompts import Prompt, read_prompts, read_stored
from alignflow.errors import AlignflowError, Problem
from alignflow.files import tensor_files
from alignflow.files.tensor_files import TensorFileError
from alignflow.kinds import nearest
from alignflow.words import listing
from alignflow.worlds.shapes import WORLDS

if TYPE_CHECKING:
    from align.config.model import UsersPolicy
    from align.config.settings import Config


def user_problems(config: Config, policy: UsersPolicy) -> list[Problem]:
    """Embeddings that are not there, and the first prompt without a user, or of a user without an embedding."""
    try:
        entries, _ = tensor_files.header(Path(policy.embeddings).expanduser())
    except TensorFileError as error:
        return [Problem("policy.embeddings", f"{policy.embeddings} cannot be read: {error}")]
    if len({entry.shape for entry in entries.values()}) != 1:
        return [Problem("policy.embeddings", f"{policy.embeddings} should hold embeddings of one shape, one per user")]
    given = {} if policy.user is None else {policy.user: 1} if isinstance(policy.user, str) else policy.user
    problems = [Problem("policy.user", _unknown(name, [*entries])) for name in given if name not in entries]
    rollout = config.rollout
    try:
        rows = read_stored(rollout.file, rollout.columns, {}) if rollout.kind != "online" else _prompts(config)
    except AlignflowError:
        return problems  # reported where the table is checked
    place = "prompts.train" if rollout.kind == "online" else "rollout.file"
    return problems + _rows(place, rows, [*entries], needed=policy.user is None)


def _prompts(config: Config) -> Iterable[Prompt]:
    for source in config.prompts.sources:
        yield from read_prompts(source.file, 1 if source.file.split(":")[0] in WORLDS else None, skipped={})


def _rows(place: str, rows: Iterable[Prompt], known: Sequence[str], needed: bool) -> list[Problem]:
    for prompt in rows:
        user = prompt.metadata.get("user")
        if user in (None, ""):
            if needed:
                said = "has no user, so it would teach nothing: add a column user, or set policy.user"
                return [Problem(place, f"{prompt.where} {said}")]
            continue
        names = user if isinstance(user, dict) else [str(user)]
        if unknown := [name for name in names if name not in known]:
            return [Problem(place, f"{prompt.where}: {_unknown(unknown[0], known)}")]
    return []


def _unknown(name: str, known: Sequence[str]) -> str:
    return f"no embedding of user{nearest(name, known, f'there are {listing(known, name)}')}"
