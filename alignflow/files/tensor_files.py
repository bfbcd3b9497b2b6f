"""Safetensors files: headers read without torch, files written atomically, portably and reproducibly."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from alignflow.errors import AlignflowError
from alignflow.files.disk import aside
from alignflow.text import first_line, printable

SIZES = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "U64": 64, "I32": 32,
         "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "C64": 64}  # fmt: skip
"""Bits of a number of each dtype."""

LARGEST = 100_000_000  # bytes of a header, the limit of the format
_UMASK = threading.Lock()


class TensorFileError(AlignflowError, ValueError):
    """A file that is not a whole safetensors file; the message gives the reason."""


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]


def header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(key -> entry, metadata) of a safetensors file.

    Raises:
        TensorFileError: it cannot be read, is cut short, or is of another kind.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start.startswith(b"version "):
                raise TensorFileError("it is a Git LFS pointer, not the file itself: run git lfs pull")
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(LARGEST, size - 8):
                raise TensorFileError(f"no header of a safetensors file ({size} bytes)")
            found = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise TensorFileError(error.strerror or str(error)) from None
    except RecursionError:
        raise TensorFileError("its header is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, TensorFileError):
            raise
        raise TensorFileError(f"its header is not JSON: {first_line(error)}") from None
    return _entries(found, size - 8 - length)


def _entries(found: Any, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    if not isinstance(found, dict):
        raise TensorFileError(f"its header holds a {type(found).__name__}")
    about = found.pop("__metadata__", None) or {}
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise TensorFileError("the metadata of its header are not texts")
    entries, ends = {}, []
    for key, value in found.items():
        try:
            dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            if whole and end > size:
                raise TensorFileError(f"it is cut short: its tensors end at byte {end} of {size}")
            if not whole or dtype not in SIZES or (end - begin) * 8 != prod(shape) * SIZES[dtype]:
                raise ValueError
        except TensorFileError:
            raise
        except (TypeError, KeyError, ValueError):
            said = printable(value, 120)
            raise TensorFileError(f"{printable(key, 80)!r} is {said}, which cannot be") from None
        entries[key] = Entry(dtype, shape)
        ends.append(end)
    if max(ends, default=0) != size:
        raise TensorFileError(f"it holds {size} bytes of tensors, and its header describes {max(ends, default=0)}")
    return entries, about


def save(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors so that equal ones make equal bytes, with the permissions of the process's umask, or not at all.

    Raises:
        OSError: the file cannot be written; an older one stays as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = aside(path)
    try:
        try:
            save_file(dict(tensors), partial, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # the way it reports a full disk
            raise OSError(str(error)) from error
        _sort_header(partial)
        os.chmod(partial, permissions())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def permissions() -> int:
    """The mode of a file that this process creates."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="utf-8") as lines:
        return 0o666 & ~next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
    with _UMASK:  # elsewhere it can only be read by setting it
        mask = os.umask(0o077)
        os.umask(mask)
    return 0o666 & ~mask


def _sort_header(path: Path) -> None:
    """Write the header again with its keys sorted; safetensors leaves the order of the metadata to chance."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
        if "__metadata__" in entries:
            entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
        file.flush()
        os.fsync(file.fileno())
