"""Registries of adapters, recipes, rewards and searches, found by listing folders. No torch.

Each file in ``align/recipes/`` and its folders is a recipe, in ``align/search/methods/`` a search method, and in
``generators/adapters/`` an adapter; :mod:`rewards` lists the rewards. ``package.module:name`` reaches code outside the
repository.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

import align.recipes
from align.recipes.base import Recipe
from align.search.base import Method
from alignflow.folders import classes_in, names_in
from alignflow.lazy import lazy
from alignflow.paths import is_file
from generators import adapters

if TYPE_CHECKING:
    from align.search import methods
else:
    methods = lazy("align.search.methods")


ADAPTERS = Path(adapters.__path__[0])

SAMPLERS = {
    "ode": "Euler steps of the probability-flow ODE, deterministic",
    "dpm2": "DPM-Solver++ of order 2, deterministic",
    "flow_sde": "Flow-GRPO's SDE step, noise a sqrt(t / (1 - t))",
    "dance_sde": "DanceGRPO's SDE step, constant noise",
    "cps": "coefficient-preserving step: the noise taken out is the noise put in",
    "ddim": "DDIM step, noise level 1 is ancestral, 0 the ODE",
    "exact": "Flow-SDE solved exactly over the step with x0_hat held",
}
"""Kinds of sampling step, each in one line; :mod:`align.maths.samplers` has the formulas."""


@cache
def recipes() -> dict[str, type[Recipe]]:
    """Kind -> recipe class, from the files of ``align/recipes/``."""
    return classes_in(align.recipes, Recipe)


@cache
def rewards() -> dict[str, type[BaseModel]]:
    """Kind -> reward settings class, from :mod:`rewards`."""
    import rewards as package

    return dict(package.kinds())


@cache
def searches() -> dict[str, type[BaseModel]]:
    """Kind -> search method, from the files of ``align/search/methods/``."""
    return dict(classes_in(methods, Method))


def generators() -> dict[str, str]:
    """Kind -> first docstring line of every adapter, read as text because adapters import torch."""
    return {kind: _first_line(_docstring(ADAPTERS / f"{kind}.py")) for kind in names_in(adapters)}


def inputs(kind: str) -> tuple[str, ...]:
    """Media that prompts of an adapter must have; empty for an adapter outside the repository, where it is unknown."""
    return tuple(declared(kind, "inputs") or ())


def declared(kind: str, attribute: str) -> Any:
    """A constant of an adapter's class or of its base classes, read as text; None if there is none."""
    outside = kind.startswith("generators.")  # a base class beside the adapters, such as that of videos
    file = ADAPTERS.parent / f"{kind.partition('.')[2]}.py" if outside else ADAPTERS / f"{kind}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body if is_file(file) else []
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    for node in (node for cls in classes for node in cls.body):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if [ast.unparse(target) for target in targets] == [attribute]:
                return ast.literal_eval(node.value)
    bases = {ast.unparse(base) for cls in classes for base in cls.bases}
    parents = [
        node.module for node in body if isinstance(node, ast.ImportFrom) and bases & {a.name for a in node.names}
    ]
    others = ((name or "").removeprefix("generators.adapters.") for name in parents if name != "generators.base")
    found = (declared(name, attribute) for name in others)
    return next((value for value in found if value is not None), None)


def makes_videos(kind: str) -> bool:
    """Whether an adapter's class or one of its base classes is the one of videos; False outside the repository."""
    outside = kind.startswith("generators.")  # a base class beside the adapters, such as that of videos
    file = ADAPTERS.parent / f"{kind.partition('.')[2]}.py" if outside else ADAPTERS / f"{kind}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body if is_file(file) else []
    bases = {ast.unparse(base) for node in body if isinstance(node, ast.ClassDef) for base in node.bases}
    parents = [
        node.module or "" for node in body if isinstance(node, ast.ImportFrom) and bases & {a.name for a in node.names}
    ]
    others = (name.rpartition(".")[2] for name in parents if name.startswith("generators.adapters."))
    return "VideoGenerator" in bases or any(map(makes_videos, others))


def summary() -> dict[str, dict[str, str]]:
    """All registered kinds: room -> kind -> first docstring line."""
    return {
        "generators": generators(),
        "recipes": {kind: _first_line(cls.__doc__) for kind, cls in recipes().items()},
        "rewards": {kind: _first_line(cls.__doc__) for kind, cls in rewards().items()},
        "samplers": SAMPLERS,
        "search": {kind: _first_line(cls.__doc__) for kind, cls in searches().items()},
    }


def reward_columns() -> dict[str, tuple[str, str]]:
    """Reward kind -> gradient (yes, no) and scope with default settings; depends = on an inner reward or a server."""
    from rewards.scopes import declared

    found = {kind: declared(cls) for kind, cls in rewards().items()}  # type: ignore[arg-type]
    words = {True: "yes", False: "no", None: "depends"}
    return {kind: (words[gradient], scope or "depends") for kind, (gradient, scope) in found.items()}


def _docstring(file: Path) -> str | None:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0].replace("``", "")
