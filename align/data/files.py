"""Atomic writes, with errors that suggest a remedy."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignflow.errors import RunFolderError
from alignflow.files import disk
from alignflow.files.disk import aside, sync
from alignflow.files.tensor_files import permissions

_REMEDIES = {
    errno.ENOSPC: "earlier files are intact: free some space, then continue with --resume",
    errno.ENOENT: "no folder can be made there, or it was moved or deleted while it was in use",
    errno.EROFS: "choose a folder that can be written to, with --out",
    errno.ENOTDIR: "a part of this path is a file: choose another folder with --out",
    errno.ENAMETOOLONG: "choose a shorter name with --out",
}
_REMEDIES |= dict.fromkeys((errno.EDQUOT, errno.EFBIG), _REMEDIES[errno.ENOSPC])
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM), _REMEDIES[errno.EROFS])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a message with the place and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or errno.ENOSPC, "choose another folder with --out")
        raise RunFolderError(f"cannot write {path}: {reason}; {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step; an error leaves the old file as it was."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step; an error leaves the old file as it was."""
    with writing(path):
        disk.write_bytes(path, content)


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
def new_folder(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A hidden folder to fill; at the end of the block it becomes ``path``, or vanishes if the block failed.

    Args:
        replaces: an existing ``path`` is removed once the new folder is whole and in its place. Only for folders that
            :func:`align.runs.owned.check_removable` lets go, or that are in a folder of the caller.

    Raises:
        RunFolderError: ``path`` holds something and is not to be replaced, or the disk refuses.
    """
    path = Path(os.path.abspath(path))
    with writing(path):
        if not replaces:
            check_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        staging, old = aside(path), aside(path)
        staging.mkdir()
        try:
            yield staging
            mode = permissions()
            for entry in staging.rglob("*"):
                if entry.is_file():
                    os.chmod(entry, mode)
                    sync(entry)
            sync(staging)
            if path.exists() and any(path.iterdir()):
                os.replace(path, old)
            try:
                os.replace(staging, path)
            except BaseException:
                if old.exists():
                    os.replace(old, path)
                raise
            sync(path.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def check_free(path: Path, flag: str = "--out") -> None:
    """Raise RunFolderError unless a folder can be made at ``path``: nothing is there, or an empty folder is."""
    if path.is_symlink():
        raise RunFolderError(f"{path} is a link; choose another folder with {flag}")
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} exists and is not a folder; choose another name with {flag}")
    if path.is_dir() and any(path.iterdir()):
        raise RunFolderError(f"{path} exists and is not empty; choose another folder with {flag}")
    if path.is_dir() and Path.cwd().is_relative_to(path.resolve()):
        raise RunFolderError(f"{path} is the working folder; choose a new one with {flag}")
