"""Environment of a run: versions, machine, git commit. Read from package metadata, without importing torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alignflow.secrets import redact

PACKAGES = ("alignflow", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pydantic")


def environment(torch_too: bool = False) -> dict[str, Any]:
    """Versions, machine and commit as plain values.

    Args:
        torch_too: import torch and add its devices and threads.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "command": [redact(argument) for argument in sys.argv],
    }
    return found | {"torch": _torch()} if torch_too else found


def git_commit() -> str | None:
    """Commit of the source tree this package runs from, with ``+changes`` if files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = commit and _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cuda": torch.version.cuda, "gpus": gpus, "threads": torch.get_num_threads()}
