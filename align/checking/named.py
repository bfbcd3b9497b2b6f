"""Checks of references in a config: custom code, folders and reward weights. Nothing is executed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.config.model import GeneratorConfig
from alignflow import plugins
from alignflow.errors import Problem
from alignflow.paths import exists, expanded, is_dir
from alignflow.worlds.shapes import WORLDS
from rewards.base import RewardSettings
from rewards.judges.models import Endpoint, Local
from rewards.scopes import without_gradient
from rewards.training.settings import Backbone, VLMBackbone
from rewards.wrappers.mixture import Member

READ = (RewardSettings, Local, Backbone, VLMBackbone, Member)
"""Settings whose folders and files are looked up."""
MUST_BE_HERE = {"path": RewardSettings, "references": RewardSettings, "lora": Local, "reference": Member}
MAY_BE_ON_THE_HUB = ("model", "processor", "tokenizer", "clip", "weights", "base", "med_config", "visual")
CODE = ("kind", "flow", "model", "latent_reward")
_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+){0,4}")
_WEIGHTS = (".bin", ".ckpt", ".json", ".pt", ".pth", ".safetensors", ".txt")


@dataclass
class Named:
    """Problems, references that only custom code can resolve, and files that are on the hub."""

    problems: list[Problem] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    away: list[tuple[str, str]] = field(default_factory=list)
    """Dotted path of a setting, and the id that is not on this machine."""


def named(config: BaseModel, run_code: bool = False) -> Named:
    """Look up all code, files and folders that ``config`` names.

    Args:
        run_code: whether to import custom code instead of only finding it.
    """
    found = Named()
    for path, part in parts_of(config):
        for name in type(part).model_fields:
            value, where = getattr(part, name), ".".join((*path, name))
            if isinstance(value, Path) and isinstance(part, RewardSettings) and not exists(value.expanduser()):
                found.problems.append(Problem(where, f"no file or folder {value} (looked in {Path.cwd()})"))
            if not isinstance(value, str):
                continue
            if name in CODE and ":" in value and (name != "model" or value.rpartition(":")[2].isidentifier()):
                _code(found, where, value, run_code)
            elif isinstance(part, READ) and not isinstance(part, Endpoint):
                here = isinstance(part, MUST_BE_HERE.get(name, ()))
                _weights(found, where, name, value, here)
    return found


def undeclared(config: BaseModel) -> list[Problem]:
    """Custom rewards whose gradient a recipe or a search follows, and which do not say that they have one.

    The code is imported, because a class of settings declares it itself.
    """
    reward, recipe, search = (getattr(config, name, None) for name in ("reward", "recipe", "search"))
    user: Any = recipe or search
    follows = "reward_gradient" in recipe.required if recipe else getattr(search, "gradients", False)
    if reward is None or not follows or reward.gradient() is not None:
        return []
    said = f"is not set, which means no gradient, and {user.kind} follows the reward's gradient: set it to true if its"
    return [
        Problem(f"{where}.differentiable", f"{said} code passes gradients from the scores to the media")
        for where, kind in without_gradient(reward, answer=None).items()
        if ":" in kind and not _declares_itself(plugins.load(kind))
    ]


def _declares_itself(code: Any) -> bool:
    return isinstance(code, type) and issubclass(code, RewardSettings)


def parts_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], BaseModel]]:
    """Every settings object inside ``value`` with its dotted path."""
    if isinstance(value, BaseModel):
        yield path, value
        for name in type(value).model_fields:
            yield from parts_of(getattr(value, name), (*path, name))
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield from parts_of(inside, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, inside in enumerate(value):
            yield from parts_of(inside, (*path, str(index)))


def _code(found: Named, where: str, kind: str, run_code: bool) -> None:
    try:
        if run_code:
            plugins.load(kind)
            return
        file = plugins.find(kind)
    except plugins.PluginError as error:
        found.problems.append(Problem(where, str(error)))
        return
    place = f", found in {file}," if file else ""
    found.unknown.append(f"{where} {kind}{place} was not imported by check; use --import to try it")


def _weights(found: Named, where: str, name: str, value: str, here: bool) -> None:
    """Look up a folder or file that a reward reads."""
    if here and value not in WORLDS:
        if not exists_here(value):
            found.problems.append(Problem(where, f"no file or folder {value} (looked in {Path.cwd()})"))
    elif name in MAY_BE_ON_THE_HUB and value not in WORLDS and not exists_here(value):
        local = value.startswith((".", "/", "~")) or ("/" not in value and value.endswith(_WEIGHTS))
        if local or not _HUB.fullmatch(value):
            said = f"no file or folder {value} (looked in {Path.cwd()}), and not an id of the hub such as owner/name"
            found.problems.append(Problem(where, said))
        elif not in_hub_cache(value):
            found.away.append((where, value))


def exists_here(path: str) -> bool:
    """Whether a path, with ``~`` replaced, is there."""
    try:
        return exists(expanded(path))
    except ValueError:
        return False


def in_hub_cache(repository: str, kind: str = "models") -> bool:
    """Whether the hub's cache has files of ``owner/name``."""
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    cache = os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))
    return is_dir(os.path.join(cache, f"{kind}--{'--'.join(repository.split('/')[:2])}"))


def generator_away(generator: GeneratorConfig) -> list[tuple[str, str]]:
    """Setting and id of a pipeline that must be downloaded; empty if it is on this machine."""
    path = generator.path
    here = path in WORLDS or exists_here(path) or in_hub_cache(path)
    return [] if here or not _HUB.fullmatch(path) else [("generator.path", path)]
