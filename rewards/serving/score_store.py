"""A file of scores that many processes read and write; damage to it loses only cached scores."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from rewards.base import RewardError

logger = logging.getLogger(__name__)

Row = dict[str, float]


class ScoreStore:
    """Key -> named numbers in one SQLite file, which takes care of concurrent writers.

    Every row carries a checksum. A row that does not fit it is treated as absent; a file that is not a database any
    more is put aside and begun anew.

    Raises:
        RewardError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write({})
        except (OSError, sqlite3.OperationalError) as error:
            raise RewardError(f"cannot keep scores in {path}: {error}; choose another folder") from None

    def read(self, keys: Sequence[str]) -> dict[str, Row]:
        """Stored rows of these keys."""
        found: dict[str, Row] = {}
        try:
            with closing(self._open()) as db:
                for start in range(0, len(keys), 500):  # SQLite takes so many variables
                    some = list(keys[start : start + 500])
                    marks = ", ".join("?" * len(some))
                    for key, row, check in db.execute(f"SELECT key, row, sum FROM scores WHERE key IN ({marks})", some):
                        if check == _checksum(key, row):
                            found[key] = json.loads(row)
        except sqlite3.DatabaseError as error:
            self._put_aside(error)
        return found

    def write(self, rows: Mapping[str, Row]) -> None:
        """Keep these; what is there under the same keys is replaced."""
        texts = {key: json.dumps(row) for key, row in rows.items()}
        try:
            with closing(self._open()) as db, db:
                db.executemany(
                    "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)",
                    [(key, text, _checksum(key, text)) for key, text in texts.items()],
                )
        except sqlite3.OperationalError as error:  # a full disk or a long lock: scores are not kept, nothing is lost
            if not rows:
                raise
            logger.warning("scores were not kept in %s: %s", self.path, error)
        except sqlite3.DatabaseError as error:
            self._put_aside(error)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=30)
        db.execute("PRAGMA synchronous = OFF")  # checksums detect what a power cut damages
        db.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, row TEXT, sum TEXT)")
        return db

    def _put_aside(self, error: sqlite3.DatabaseError) -> None:
        if isinstance(error, sqlite3.OperationalError):
            logger.warning("kept scores in %s cannot be read now: %s", self.path, error)
            return
        damaged = self.path.with_suffix(".damaged")
        self.path.replace(damaged)
        logger.warning(
            "%s is damaged (%s); it was moved to %s, and its scores are computed again", self.path, error, damaged
        )


def _checksum(key: str, row: str) -> str:
    return hashlib.sha256(f"{key} {row}".encode()).hexdigest()[:16]
