"""Modules, functions and classes imported on first use, so that commands without tensors start at once.

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy("torch")

``load = lazy("package.module:load")`` stands for a function or a class of a module. Type checkers and editors see the
real import; at run time the module is imported when an attribute is read or the function is called.
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


class _LazyName:
    """Stands for a function or a class of a module, to be called or to read attributes of. Not for isinstance."""

    def __init__(self, name: str) -> None:
        self.__name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__found()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copying and inspecting, which should not import anything
            raise AttributeError(name)
        return getattr(self.__found(), name)

    def __found(self) -> Any:
        module, _, name = self.__name.partition(":")
        return getattr(importlib.import_module(module), name)


def lazy(name: str) -> Any:
    """``package.module`` or ``package.module:name``, imported on first use; a loaded module is returned itself."""
    if ":" in name:
        return _LazyName(name)
    return sys.modules.get(name) or _Lazy(name)
