"""The file of a bundle: an uncompressed tar of plain files whose digests are in its manifest. No torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from align.data.files import new_folder, writing
from alignflow.errors import AlignflowError
from alignflow.files.disk import aside
from alignflow.text import first_line, printable

MANIFEST = "bundle.json"
FORMAT = "alignflow-bundle-1"
LARGEST_MANIFEST = 50_000_000


class BundleError(AlignflowError, ValueError):
    """A bundle that cannot be made, read or repeated; the message gives the reason and the remedy."""

    exit_code = 2


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, files: Mapping[str, Path | bytes], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write a bundle; the file appears whole or not at all, and equal content gives equal bytes.

    Args:
        files: name inside the bundle, with slashes -> the file, or its content.
        about: what the manifest says besides ``format`` and the digests under ``files``.

    Returns:
        The manifest.
    """
    digests = {
        name: hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else digest_of(content)
        for name, content in sorted(files.items())
    }
    manifest = {"format": FORMAT, **about, "files": digests}
    partial = aside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tarfile.open(partial, "x:", format=tarfile.PAX_FORMAT) as archive:
                _add(archive, MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
                for name in digests:
                    _add(archive, name, files[name])
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return manifest


def _add(archive: tarfile.TarFile, name: str, content: Path | bytes) -> None:
    entry = tarfile.TarInfo(name)  # no owner, no time: the same on every machine
    if isinstance(content, bytes):
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
        return
    with content.open("rb") as file:
        entry.size = os.fstat(file.fileno()).st_size
        archive.addfile(entry, file)


def unpack(path: Path, folder: Path) -> dict[str, Any]:
    """Unpack a bundle into a new folder, which appears whole or not at all; the manifest.

    Only plain files with relative names that the manifest lists are written, and each must have its digest.

    Raises:
        BundleError: not a bundle, damaged, or an entry that does not belong into one; names the entry.
        RunFolderError: the folder exists and holds something.
    """
    try:
        with tarfile.open(path, "r:") as archive, new_folder(folder) as staging:
            return _unpacked(path, archive, staging)
    except (tarfile.TarError, EOFError) as error:
        raise BundleError(f"{path} is not a bundle of alignflow: {first_line(error)}") from None
    except FileNotFoundError:
        raise BundleError(f"{path} does not exist (looked in {Path.cwd()})") from None


def _unpacked(path: Path, archive: tarfile.TarFile, staging: Path) -> dict[str, Any]:
    first = archive.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > LARGEST_MANIFEST:
        raise BundleError(f"{path} is not a bundle of alignflow: its first entry is not {MANIFEST}")
    text = _content(archive, first).read()
    manifest = parsed(text, str(path))
    (staging / MANIFEST).write_bytes(text)
    expected = dict(manifest["files"])
    while (entry := archive.next()) is not None:
        name = printable(entry.name, 200)
        if reason := _strange(entry, expected):
            raise BundleError(f"{path} holds the entry {name}, which {reason}; nothing was unpacked")
        target = staging / PurePosixPath(entry.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _content(archive, entry) as source, target.open("xb") as file:
            while block := source.read(1 << 20):
                file.write(block)
        if digest_of(target) != expected.pop(entry.name):
            raise BundleError(f"{path} is damaged: {name} differs from the packed file; nothing was unpacked")
    if expected:
        raise BundleError(f"{path} is damaged: it lacks {printable(min(expected), 200)}; nothing was unpacked")
    return manifest


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> Any:
    content = archive.extractfile(entry)
    assert content is not None  # it is a plain file
    return content


def _strange(entry: tarfile.TarInfo, expected: Mapping[str, str]) -> str:
    """The reason why an entry is not unpacked; empty if it is."""
    if not entry.isreg() or entry.issparse():
        return "is not a plain file"
    parts = entry.name.split("/")
    if entry.name.startswith("/") or "\\" in entry.name or ":" in entry.name or {"", ".", ".."} & set(parts):
        return "would lie outside the folder"
    return "" if entry.name in expected else "the manifest does not list, or which comes twice"


def parsed(text: bytes, where: str) -> dict[str, Any]:
    """The manifest; BundleError if it is not of this version."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise BundleError(f"{where}: {MANIFEST} is not JSON") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("files"), dict):
        raise BundleError(
            f"{where}: {MANIFEST} is not of the format {FORMAT}; repeat it with the version that wrote it"
        )
    return found
