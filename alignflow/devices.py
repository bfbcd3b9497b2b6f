"""Device names: validation of their form and of their presence on this machine.

Torch is imported only by :func:`unusable`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

NAMES = "cpu, cuda, cuda:1, mps"
FP8 = (8, 9)
"""Least compute capability of a card with products in fp8."""
_FORM = re.compile(r"cpu|mps|cuda(:\d{1,3})?", re.ASCII)


def malformed(name: str, auto: bool = False) -> str | None:
    """Problem of a device's name as text, None if it is well formed.

    Args:
        auto: whether ``auto`` is one too.
    """
    if _FORM.fullmatch(name) or (auto and name == "auto"):
        return None
    return f"no such device {name!r:.80}; there are {'auto, ' if auto else ''}{NAMES}"


def absent(name: str) -> str | None:
    """The reason why this machine certainly lacks a device, as far as known without torch; None if it may have it."""
    if name == "mps" and sys.platform != "darwin":
        return _lacks(name, "mps is Apple's")
    if name.startswith("cuda") and not _built_for_cuda():
        return _lacks(name, "torch is installed without CUDA")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if name.startswith("cuda") and visible is not None and visible.strip() in ("", "-1"):
        return _lacks(name, "CUDA_VISIBLE_DEVICES hides every card")
    return None


def unusable(name: str) -> str | None:
    """The reason why a device cannot be used here, malformed or absent; None if it can."""
    import torch

    wrong = malformed(name) or (None if name == "cpu" else absent(name))
    if wrong is None and name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= count:
            wrong = _lacks(name, f"torch sees {count or 'no'} CUDA device{'' if count == 1 else 's'}")
    if wrong is None and name == "mps" and not torch.backends.mps.is_available():
        wrong = _lacks(name, "torch cannot use mps here")
    return wrong


def capabilities(command: str = "nvidia-smi") -> dict[str, tuple[int, int]]:
    """Name -> compute capability of this machine's NVIDIA cards, as the driver's tool says; empty where it says none.

    Cards that CUDA_VISIBLE_DEVICES hides are among them.
    """
    asked = [command, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = re.findall(r"^(.+), (\d+)\.(\d+)$", done.stdout, re.MULTILINE) if not done.returncode else []
    return {name.strip(): (int(major), int(minor)) for name, major, minor in rows}


def _lacks(name: str, reason: str) -> str:
    return f"{name} is not available on this machine: {reason}; use cpu"


def _built_for_cuda() -> bool:
    """Whether the installed torch was built for CUDA or ROCm, as its version file says; True if that is unknown."""
    found = find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    try:
        text = file.read_text(encoding="utf-8") if file else ""
    except OSError:
        return True
    values = re.findall(r"^(?:cuda|hip)\b[^=\n]*=\s*(\S+)", text, re.MULTILINE)
    return not values or any(value != "None" for value in values)
