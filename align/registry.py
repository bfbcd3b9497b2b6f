"""What exists, found by listing folders; nothing here imports torch.

A file in ``align/recipes/`` is a recipe, a file in ``generators/`` an adapter; ``rewards`` lists its own kinds.
``package.module:name`` reaches code outside the repository.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import align.recipes
import generators as adapters
from align.recipes.base import Recipe
from alignflow.paths import is_file

SAMPLERS = {
    "ode": "Euler steps of the probability-flow ODE, deterministic",
    "dpm2": "DPM-Solver++ of order 2, deterministic",
    "flow_sde": "Flow-GRPO's SDE step, noise a sqrt(t / (1 - t))",
    "dance_sde": "DanceGRPO's SDE step, constant noise",
    "cps": "coefficient-preserving step: the noise taken out is the noise put in",
    "ddim": "DDIM step, level 1 is ancestral, 0 the ODE",
    "exact": "Flow-SDE solved exactly over the step with x0_hat held",
}
"""Kinds of sampling step, each in one line; :mod:`align.samplers` has the formulas."""

_HAS_A_KIND = re.compile(r'^    kind: Literal\["', re.MULTILINE)


def _by_kind(what: str, modules: Iterable[str], base: type[BaseModel]) -> dict[str, Any]:
    """Kind -> class derived from ``base``, of those that the modules themselves define."""
    found: dict[str, Any] = {}
    for name in modules:
        module = importlib.import_module(name)
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, base) and cls.__module__ == module.__name__:
                kind = cls.model_fields["kind"].default
                assert kind not in found, f"two {what} are called {kind!r}: {found[kind]} and {cls}"
                found[kind] = cls
    return dict(sorted(found.items()))


@cache
def recipes() -> dict[str, type[Recipe]]:
    """Kind -> recipe class, one per file of ``align/recipes/``."""
    names = [info.name for info in pkgutil.iter_modules(align.recipes.__path__)]
    mine = [f"align.recipes.{name}" for name in names if name != "base" and not name.startswith("_")]
    return _by_kind("recipes", mine, Recipe)


@cache
def rewards() -> dict[str, type[BaseModel]]:
    """Kind -> reward settings class, as :mod:`rewards` lists them."""
    import rewards as package

    return dict(sorted(package.kinds().items()))


@cache
def searches() -> dict[str, type[BaseModel]]:
    """Kind -> search method, one per file of ``align/search/`` whose class has a kind; other files are not imported."""
    import align.search

    files = sorted(Path(align.search.__path__[0]).glob("[!_]*.py"))
    methods = [file for file in files if _HAS_A_KIND.search(file.read_text(encoding="utf-8"))]
    return _by_kind("search methods", [f"align.search.{file.stem}" for file in methods], BaseModel)


def generators() -> dict[str, str]:
    """Kind -> one line, for every adapter; read as text because adapters import torch."""
    folder = Path(adapters.__path__[0])
    return {kind: _first_line(_docstring(folder / f"{kind}.py")) for kind in adapters.kinds()}


def inputs(kind: str) -> tuple[str, ...]:
    """Media that prompts of an adapter must come with; none known for one outside the repository."""
    return tuple(declared(kind, "inputs") or ())


def declared(kind: str, attribute: str) -> Any:
    """A constant of an adapter's class, or of a class it is derived from, read as text; None where there is none."""
    file = Path(adapters.__path__[0]) / f"{kind}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body if is_file(file) else []
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    for node in (node for cls in classes for node in cls.body):
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [attribute]:
            return ast.literal_eval(node.value)
    bases = {ast.unparse(base) for cls in classes for base in cls.bases}
    parents = [
        node.module for node in body if isinstance(node, ast.ImportFrom) and bases & {a.name for a in node.names}
    ]
    found = (
        declared((name or "").removeprefix("generators."), attribute) for name in parents if name != "generators.base"
    )
    return next((value for value in found if value is not None), None)


def summary() -> dict[str, dict[str, str]]:
    """Everything registered: room -> kind -> one line."""
    return {
        "generators": generators(),
        "recipes": {kind: _first_line(cls.__doc__) for kind, cls in recipes().items()},
        "rewards": {kind: _first_line(cls.__doc__) for kind, cls in rewards().items()},
        "samplers": SAMPLERS,
        "search": {kind: _first_line(cls.__doc__) for kind, cls in searches().items()},
    }


def _docstring(file: Path) -> str | None:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0].replace("``", "")
