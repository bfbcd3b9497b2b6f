"""Models and datasets that a config names on the hub: one error for all of them if none can be downloaded. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from pydantic import BaseModel

from align.checking.named import exists_here, generator_away, in_hub_cache, named, parts_of
from align.config.model import GeneratorConfig
from align.data.tables import HUB
from align.rewriting.settings import LocalWriter
from alignflow import hub
from alignflow.errors import ConfigError
from alignflow.worlds.shapes import WORLDS

Tree = TypeVar("Tree", bound=BaseModel)

DATASETS = ("train", "heldout", "source", "file")
"""Settings that may name a dataset of the hub."""


def within_reach(config: Tree, section: str = "") -> Tree:
    """The config itself, once what it names on the hub is on this machine or the hub answers.

    Commands call it before they import torch, so that a machine without a network says so within seconds.

    Args:
        section: the only section of the config that the command reads, ``generator``; empty = all.

    Raises:
        ConfigError: the hub does not answer; lists all settings that need it.
    """
    needed = [(where, name) for where, name in away(config) if f"{where}.".startswith(section and f"{section}.")]
    if not needed or not (reason := hub.silent()):
        return config
    lines = "\n".join(f"  {where} {name}" for where, name in needed)
    kind = "dataset" if needed[0][1].startswith(HUB) else "model"
    advice = hub.advice(needed[0][1].removeprefix(HUB).partition(":")[0], kind)
    raise ConfigError(f"the hub cannot be reached ({reason}) and this machine lacks\n{lines}\n  {advice}")


def away(config: BaseModel) -> Iterator[tuple[str, str]]:
    """Setting and id of everything that a run of this config certainly reads and this machine does not have.

    Left out are settings that some runs never read (tokenizers, base models) and rewards that are built in workers.
    """
    pools = [path for path, part in parts_of(config) if getattr(part, "kind", None) == "pool"]
    for path, part in parts_of(config):
        if isinstance(part, GeneratorConfig):
            yield from generator_away(part)
        if isinstance(part, LocalWriter) and not _here(part.model):
            yield ".".join((*path, "model")), part.model
        for name in DATASETS:
            value = getattr(part, name, None)
            if isinstance(value, str) and value.startswith(HUB) and not _cached(value):
                yield ".".join((*path, name)), value
    for where, name in named(config).away:
        words = tuple(where.split("."))
        pooled = any(words[: len(pool)] == pool for pool in pools)
        if words[-1] == "model" and not pooled:
            yield where, name


def _here(model: str) -> bool:
    on_hub = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    return model in WORLDS or not on_hub or exists_here(model) or in_hub_cache(model)


def _cached(source: str) -> bool:
    return in_hub_cache(source.removeprefix(HUB).partition(":")[0], "datasets")
