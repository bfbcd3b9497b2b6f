"""Modules imported on first use, so that commands without tensors start at once.

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy("torch")

Type checkers and editors see the real import; at run time the module is imported when an attribute of it is read.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Lazy(ModuleType):
    """Stands for a module until an attribute is read."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # the next read does not come here
        return value


def lazy(name: str) -> Any:
    """The module ``name``, imported on first use; the module itself where it is imported already."""
    return sys.modules.get(name) or _Lazy(name)
