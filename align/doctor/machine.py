"""Memory, disk, shared memory, threads and load of this machine."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.doctor.findings import Finding
from alignflow.cores import cores
from alignflow.words import count

GB = 1e9
ENOUGH_MEMORY, LITTLE_MEMORY = 8.0, 2.0
"""GB of memory: for comfort, and below which the quickstart may be killed (it takes 1.3 GB)."""
ENOUGH_DISK, LITTLE_DISK = 50.0, 0.5
"""GB of disk: an SD3.5 with its checkpoints, and below which a run of an embedded world may not end."""
ENOUGH_SHARED = 1.0


@dataclass(frozen=True)
class Load:
    """Cores that this process may use, and the mean number of runnable processes over a minute."""

    cores: float
    load: float
    omp: str = ""


def read_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> tuple[float, float]:
    """(available, total) memory in GB; a container's limit counts. NaN if the system does not say."""
    text = _text(meminfo)
    known = {match[1]: int(match[2]) * 1024 / GB for match in re.finditer(r"(?m)^(\w+):\s+(\d+) kB", text)}
    available, total = (known.get(name, float("nan")) for name in ("MemAvailable", "MemTotal"))
    limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit) / GB)
        available = min(available, (int(limit) - int(used)) / GB)
    return available, total


def memory(found: tuple[float, float]) -> Iterator[Finding]:
    """Memory of the machine; nothing if it is not known."""
    available, total = found
    if available != available:
        return
    said = f"{available:.1f} of {total:.1f} GB available"
    if available < LITTLE_MEMORY:
        yield Finding("memory", "blocks", said, "close other programs: the smallest run takes 1.3 GB")
    elif available < ENOUGH_MEMORY:
        advice = "enough for the embedded worlds; memory.offload and large models need more than their weights"
        yield Finding("memory", "note", said, advice)
    else:
        yield Finding("memory", "ok", said)


def disk(folder: Path) -> Iterator[Finding]:
    """Room where runs are written and where the hub's models go."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for name, place, remedy in (
        ("disk of runs", folder.resolve(), "write runs elsewhere with --out"),
        ("disk of models", home, "set HF_HOME to a folder on a larger disk"),
    ):
        there = next(one for one in (place, *place.parents) if one.exists())
        if not os.access(there, os.W_OK):
            state = "blocks" if place == folder.resolve() else "note"
            yield Finding(name, state, f"{there} is read-only", remedy)  # type: ignore[arg-type]
            continue
        free = shutil.disk_usage(there).free / GB
        yield room(name, there, free, remedy, blocks=place == folder.resolve())


def room(name: str, place: Path, free: float, remedy: str, blocks: bool) -> Finding:
    """Finding on ``free`` GB in a folder."""
    said = f"{free:.1f} GB free in {place}"
    if blocks and free < LITTLE_DISK:
        return Finding(name, "blocks", said, f"free some, or {remedy}")
    if free < ENOUGH_DISK:
        return Finding(
            name, "note", said, f"SD3.5 with its encoders and checkpoints takes {ENOUGH_DISK:.0f} GB; {remedy}"
        )
    return Finding(name, "ok", said)


def read_shared_memory(place: Path = Path("/dev/shm")) -> float | None:
    """Free GB of shared memory; None on a system without."""
    return shutil.disk_usage(place).free / GB if place.is_dir() else None


def shared_memory(free: float | None) -> Finding:
    """Shared memory, which NCCL and Ray exchange tensors through."""
    if free is None:
        return Finding("shared memory", "ok", "this system has no /dev/shm")
    said = f"{free * 1000:.0f} MB free in /dev/shm" if free < 1 else f"{free:.1f} GB free in /dev/shm"
    if free >= ENOUGH_SHARED:
        return Finding("shared memory", "ok", said)
    advice = "several processes and Ray need more: start the container with --shm-size=8g or --ipc=host"
    return Finding("shared memory", "note", said, advice)


def read_load(group: Path = Path("/sys/fs/cgroup")) -> Load:
    """Cores by affinity and the container's quota, load average and OMP_NUM_THREADS."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Load(cores(group), load, os.environ.get("OMP_NUM_THREADS", ""))


def load(found: Load, seen: Mapping[str, Any]) -> Finding:
    """Whether other programs use the cores, and whether torch starts more threads than there are cores."""
    threads = int(seen.get("threads", 0))
    said = f"{found.cores:g} cores, load {found.load:.1f}" + (
        f", {count(threads, 'thread')} of torch" if threads else ""
    )
    if found.load > 0.5 * found.cores:
        slower = 1 + found.load / found.cores
        advice = (
            f"other programs are running: a run on the CPU takes about {slower:.1f} times as long; wait, or close them"
        )
        return Finding("cores", "note", said, advice)
    if threads > found.cores:
        advice = f"more threads than cores slow each other down: export OMP_NUM_THREADS={max(1, int(found.cores))}"
        return Finding("cores", "note", said, advice)
    return Finding("cores", "ok", said)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
