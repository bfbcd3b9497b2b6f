"""Folders as registries: every module of one defines at least one class with a kind."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel

Base = TypeVar("Base", bound=BaseModel)


def names_in(package: ModuleType) -> list[str]:
    """Names of the modules of a package, sorted; ``base``, names with a leading underscore and folders are left out."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.ispkg]
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


def classes_in(package: ModuleType, base: type[Base]) -> dict[str, type[Base]]:
    """Kind -> class derived from ``base``, of every module in the folder of ``package`` and in the folders in it.

    A kind is a value of the ``Literal`` that annotates the class's field ``kind``.

    Raises:
        ImportError: a module defines no such class, or two classes have one kind.
    """
    found: dict[str, type[Base]] = {}
    for module in _modules(package):
        own = [(kind, cls) for cls in _defined(module, base) for kind in _kinds(cls)]
        if not own:
            raise ImportError(
                f"{module.__file__} defines no class derived from {base.__name__} with kind: Literal['name']; "
                f"a file in the folder of {package.__name__} must"
            )
        for kind, cls in own:
            if kind in found:
                raise ImportError(f"two classes have the kind {kind!r}: {found[kind]} and {cls}")
            found[kind] = cls
    return dict(sorted(found.items()))


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    for name in names_in(package):
        yield importlib.import_module(f"{package.__name__}.{name}")
    for info in pkgutil.iter_modules(package.__path__):
        if info.ispkg:
            yield from _modules(importlib.import_module(f"{package.__name__}.{info.name}"))


def _defined(module: ModuleType, base: type[Base]) -> list[type[Base]]:
    """The classes derived from ``base`` that the module itself defines."""
    values = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    return [value for value in values if value.__module__ == module.__name__]


def _kinds(cls: type[BaseModel]) -> tuple[Any, ...]:
    field = cls.model_fields.get("kind")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
