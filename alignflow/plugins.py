"""Custom code, ``package.module:name`` or ``path/to/file.py:name``, for rewards, recipes, searches and generators.
:func:`load` imports it; :func:`find` only parses it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from alignflow.errors import AlignflowError
from alignflow.paths import expanded, is_file
from alignflow.text import first_line

OURS = ("align", "alignflow", "generators", "rewards")
REMEDY = "run where it is, install it, or write path/to/file.py:name"

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_runs: ContextVar[bool] = ContextVar("runs", default=True)


class PluginError(AlignflowError, ValueError):
    """There is no such module, file or name, or it cannot be imported; the message names it and the reason."""


@contextmanager
def unread() -> Iterator[None]:
    """Within this block settings of such code are made without running it, see :func:`runs`."""
    token = _runs.set(False)
    try:
        yield
    finally:
        _runs.reset(token)


def runs() -> bool:
    """Whether code of a user may be imported here."""
    return _runs.get()


def load(kind: str) -> Any:
    """The object that ``kind`` names; modules are looked for in the working folder too.

    Raises:
        PluginError: no such module, file or name, or importing it failed.
    """
    place, name = _parts(kind)
    found: Any = _run_file(_file(place)) if place.endswith(".py") else _run_module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            have = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise PluginError(f"{place!r} has no {name!r}; it has {', '.join(have[:20]) or 'nothing to call'}")
        found = getattr(found, part)
    return found


def find(kind: str) -> Path | None:
    """The file that holds ``kind``, without running anything of it; None if that is unknown.

    Raises:
        PluginError: no such module or file, or its text does not define the name.
    """
    place, name = _parts(kind)
    file = _file(place) if place.endswith(".py") else _module_file(place)
    if file is None:
        return None
    try:
        defined = _defined(ast.parse(file.read_bytes()))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        raise PluginError(f"{file}{f':{line}' if line else ''} is not Python: {first_line(error)}") from None
    except OSError as error:
        raise PluginError(f"{file} cannot be read: {error.strerror}") from None
    if defined is not None and name.split(".")[0] not in defined:
        have = ", ".join(sorted(word for word in defined if not word.startswith("_"))[:20])
        raise PluginError(f"{place!r} has no {name!r}; it has {have or 'nothing'}")
    return file


def shadow(module: str) -> str:
    """Remedy for a module that one of this project's own packages hides, or nothing."""
    top = module.partition(".")[0]
    if top in OURS and is_file(f"{top}.py"):
        return f"{top} is a package of alignflow, so {top}.py in this folder is never imported; write {top}.py:name"
    return ""


def _parts(kind: str) -> tuple[str, str]:
    place, _, name = kind.rpartition(":")
    if not name or not (place.endswith(".py") or _MODULE.fullmatch(place)) or not _MODULE.fullmatch(name):
        raise PluginError(f"{kind[:200]!r} should read package.module:name or path/to/file.py:name")
    return place, name


def _file(place: str) -> Path:
    path = expanded(place, PluginError)
    if not is_file(path):
        raise PluginError(f"no file {place[:300]}, looked for from {Path.cwd()}")
    return path


def _look_here() -> None:
    """A console command does not look for modules in the working folder by itself."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _module_file(name: str) -> Path | None:
    """The file of a module, found by Python's finders without importing what is around it."""
    _look_here()
    top, *below = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for index, _ in enumerate(below):
            if spec is None:
                break
            if spec.submodule_search_locations is None:
                raise PluginError(f"cannot import {name!r}: {spec.name} is not a package; {REMEDY}")
            full = ".".join((top, *below[: index + 1]))
            spec = importlib.machinery.PathFinder.find_spec(full, list(spec.submodule_search_locations))
    except (ValueError, ImportError, OSError, AttributeError) as error:
        if isinstance(error, PluginError):
            raise
        return None  # loaded in its own way
    if spec is None:
        raise PluginError(f"cannot import {name!r}: no module of this name; {shadow(name) or REMEDY}")
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _defined(module: ast.Module) -> set[str] | None:
    """Names that a module's text binds at its top; None if only running it shows them."""
    found: set[str] = set()
    open_blocks: list[ast.AST] = list(module.body)
    while open_blocks:
        node = open_blocks.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
            if "*" in names:
                return None
            found.update(names)
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Name) and node.id in ("globals", "exec", "setattr", "vars"):
                return None
            open_blocks.extend(ast.iter_child_nodes(node))
    return None if "__getattr__" in found else found


def _run_module(name: str) -> ModuleType:
    _look_here()
    if said := shadow(name):
        raise PluginError(said)
    return _ran(name, lambda: importlib.import_module(name))


def _run_file(path: Path) -> ModuleType:
    name = f"alignflow_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there

    def run() -> ModuleType:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return module

    return _ran(str(path), run)


def _ran(place: str, run: Any) -> ModuleType:
    """The result of ``run``, which imports; errors of the user's code, ``sys.exit`` too, are raised with their line."""
    try:
        return run()
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise PluginError(f"cannot import {place!r}: {error}; {REMEDY}") from error
        raise PluginError(f"importing {place} needs {error.name}, which is not installed{_where(error)}") from error
    except (Exception, SystemExit) as error:
        said = first_line(error)
        raise PluginError(f"importing {place} raised {type(error).__name__}: {said}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """`` (file.py:3)``: the innermost line outside the import system."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
