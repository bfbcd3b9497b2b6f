"""Facts about a run: duration, counts, files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.report.reading import Run, number

MAX_FILES = 40


def facts(run: Run) -> list[tuple[str, str]]:
    """Label and value of facts that are numbers."""
    took = costs(run)
    online = run.section("rollout").get("kind", "online") == "online"
    held_out = _known(row.get("prompts") for row in run.evals)
    gpus = (run.environment.get("torch") or {}).get("gpus") if isinstance(run.environment.get("torch"), dict) else None
    memory = took.get("memory_gb")
    found = [
        ("time", duration(took["seconds"]) if "seconds" in took else None),
        ("training steps", f"{run.steps:,}"),
        ("training samples generated" if online else "samples trained on", _count(took.get("samples"))),
        ("held-out samples generated", _count(sum(held_out)) if held_out else None),
        ("network calls", _count(run.summary.get("network_calls"))),
        ("held-out prompts", _count(held_out[-1]) if held_out else None),
        ("peak GPU memory", None if memory is None else f"{memory:.1f} GB"),
        ("GPU", ", ".join(dict.fromkeys(map(str, gpus))) if gpus and memory is not None else None),
        ("seed", str(run.summary["seed"]) if "seed" in run.summary else None),
    ]
    return [(label, value) for label, value in found if value is not None]


def costs(run: Run) -> dict[str, float]:
    """Cost of a training run: seconds, steps, samples, training_calls, network_calls, memory_gb.

    ``training_calls`` are the network calls of the training steps, ``network_calls`` those of the whole run with its
    evaluations. What is not known is left out.
    """
    seconds = number(run.summary.get("seconds") or (run.train[-1].get("seconds") if run.train else None))
    columns = {name: _known(run.curve(name)[1]) for name in ("samples", "network_calls", "memory_gb")}
    found = {
        "seconds": seconds,
        "steps": run.steps,
        "samples": sum(columns["samples"]) if columns["samples"] else None,
        "training_calls": sum(columns["network_calls"]) if columns["network_calls"] else None,
        "network_calls": number(run.summary.get("network_calls")),
        "memory_gb": max(columns["memory_gb"], default=None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _known(values: Iterable[Any]) -> list[float]:
    return [found for value in values if (found := number(value)) is not None]


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``; the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def listing(folder: Path) -> list[tuple[str, str]]:
    """Path and size of the run's files; a folder of samples or a checkpoint counts as one entry."""
    entries = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "report.html":
            continue
        inner = path.name in ("samples", "checkpoints") and path.is_dir()
        entries += sorted(p for p in path.iterdir() if not p.name.startswith(".")) if inner else [path]
    return [(_shown(path, folder), _size(path)) for path in entries[:MAX_FILES]]


def environment(run: Run) -> list[tuple[str, str]]:
    """Name and value of what the run ran on; what is not known is left out."""
    return [(name, _flat(value)) for name, value in run.environment.items() if value not in (None, "", [], {})]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(part)}" for name, part in value.items() if part not in (None, []))
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _count(value: Any) -> str | None:
    known = number(value)
    return None if known is None else f"{known:,.0f}"


def _shown(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")


def _size(path: Path) -> str:
    inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return bytes_text(sum(p.stat().st_size for p in inside))


def bytes_text(count: float) -> str:
    """``1234567`` -> ``1.2 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
