"""``manifest.json`` of a checkpoint: contents, owner, and digests of all files including the manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.data.files import without_nan, write_text
from alignflow.errors import AlignflowError

FORMAT = 3
SEVERAL = 3
"""Since this format a checkpoint holds learners; before, one policy."""
NEEDED = ("roles.safetensors", "optimizer.pt")
_COUNTERS: dict[str, type] = {"step": int, "seconds": float}
_OF_A_LEARNER: dict[str, type] = {"updates": int, "skipped": int}

NAME = re.compile(r"step-(\d{6,})")


class DamagedError(AlignflowError):
    """A checkpoint that is not as it was written; the message names the part."""


def write(folder: Path, content: Mapping[str, Any], version: int = FORMAT) -> None:
    """Write the manifest of all files in ``folder``: ``step``, ``counters``, ``roles`` and ``identity`` are given."""
    files = {str(file.relative_to(folder)): digest(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    whole = without_nan({"format": version, **content, "files": files})
    write_text(folder / "manifest.json", _text({**whole, "sha256": _sha(whole)}))


def read(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked as a whole.

    Raises:
        DamagedError: it is missing, of another version, or not as it was written.
    """
    file = path / "manifest.json"
    try:
        text = file.read_bytes().decode("utf-8")
        found = json.loads(text)
    except FileNotFoundError:
        raise DamagedError("it has no manifest.json") from None
    except (OSError, ValueError, RecursionError):
        raise DamagedError("manifest.json is damaged") from None
    if not isinstance(found, dict):
        raise DamagedError("manifest.json is damaged")
    if type(version := found.get("format")) is not int or not 1 <= version <= FORMAT:
        raise DamagedError(f"manifest.json has format {version!r:.20}; this version reads 1 to {FORMAT}")
    sha = found.pop("sha256", None)
    if (version > 1 and (sha != _sha(found) or text != _text({**found, "sha256": sha}))) or (
        version == 1 and sha is not None
    ):
        raise DamagedError("manifest.json is damaged")
    if wrong := _wrong(found, path.name):
        raise DamagedError(f"manifest.json is damaged ({wrong})")
    return found


def check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise DamagedError unless every file of the manifest is there as it was written."""
    for name, expected in manifest["files"].items():
        try:
            same = digest(path / name) == expected
        except OSError:
            same = False
        if not same:
            raise DamagedError(f"{name} is damaged or missing")


def list_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in ``folder``, rising."""
    if not folder.is_dir():
        return []
    matches = (NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None. Leftovers of an interrupted write are hidden and never count."""
    steps = list_steps(folder)
    return folder / f"step-{steps[-1]:06d}" if steps else None


def digest(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _sha(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _wrong(found: Mapping[str, Any], name: str) -> str:
    """Invalid content of a manifest; empty if it is valid."""
    counters, roles, files = found.get("counters"), found.get("roles"), found.get("files")
    if not isinstance(counters, dict) or not _counted(counters, _COUNTERS):
        return "counters"
    several = found["format"] >= SEVERAL
    learners, versions = (counters.get("learners"), roles) if several else ({"policy": counters}, {"policy": roles})
    if not isinstance(learners, dict) or not all(_counted(one, _OF_A_LEARNER) for one in learners.values()):
        return "counters"
    if not isinstance(versions, dict) or not versions.keys() == learners.keys() >= {"policy"}:
        return "roles"
    if not all(map(_versions, versions.values())):
        return "roles"
    if not isinstance(files, dict) or not set(NEEDED) <= files.keys():
        return "files"
    if any(Path(file).is_absolute() or ".." in Path(file).parts for file in files):
        return "files outside the checkpoint"
    return "" if isinstance(found.get("identity", {}), dict) else "identity"


def _counted(counters: Any, kinds: Mapping[str, type]) -> bool:
    return isinstance(counters, dict) and all(_number(counters.get(key), kind) for key, kind in kinds.items())


def _versions(roles: Any) -> bool:
    return isinstance(roles, dict) and "policy" in roles and all(type(value) is int for value in roles.values())


def _number(value: Any, kind: type) -> bool:
    known = type(value) is int or (kind is float and isinstance(value, float))
    return known and 0 <= value < 2**63
