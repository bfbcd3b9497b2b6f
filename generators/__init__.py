"""Diffusers pipelines as velocity fields: :mod:`generators.base` is the interface, ``adapters/`` has one file each.

Importing this package imports no torch.
"""

from __future__ import annotations

from alignflow.folders import names_in
from generators import adapters


def kinds() -> list[str]:
    """Names of the adapters: the files of ``generators/adapters/``."""
    return names_in(adapters)
