"""Writes that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import RunFolderError


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a message with the place and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFolderError(
            f"cannot write {path}: {reason}; what was written before is intact: make room, then go on with --resume"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step; an error leaves the old file as it was."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step; an error leaves the old file as it was."""
    with explained(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, data: Any) -> None:
    """Replace ``path`` by ``data`` as JSON; NaN is written as null."""
    write_text(path, json.dumps(without_nan(data), indent=2) + "\n")


def without_nan(data: Any) -> Any:
    """``data`` with NaN and infinities as None, which JSON can hold."""
    if isinstance(data, dict):
        return {key: without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    if isinstance(data, float) and not (-float("inf") < data < float("inf")):
        return None
    return data


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to fill; at the end of the block it becomes ``path``, or vanishes if the block failed."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield staging
            for file in staging.rglob("*"):
                if file.is_file():
                    _sync(file)
            os.chmod(staging, 0o755)
            if path.exists():
                shutil.rmtree(path)
            os.replace(staging, path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
