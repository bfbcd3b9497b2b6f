"""Diffusers pipelines seen as velocity fields: :mod:`generators.base` is the contract, an adapter is a file.

Importing this package imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

_ADAPTER = re.compile(r'^    pipeline_class = "\w', re.MULTILINE)


def kinds() -> list[str]:
    """Names of the adapters: the files of this folder with a class that names the pipeline it reads."""
    files = Path(__file__).parent.glob("[!_]*.py")
    return sorted(file.stem for file in files if _ADAPTER.search(file.read_text(encoding="utf-8")))
