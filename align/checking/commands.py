"""The check of a config of any command. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

from align.checking import check, fitting
from align.checking.named import Named, generator_away, named, undeclared
from align.config.load import Files, files_of, keys_of, load_settings, read_layers, said_of
from align.config.roots import roots_of
from align.config.sections import is_unread
from align.config.settings import Config
from align.preference import settings as preferences
from align.reasoning import settings as reasonings
from align.rewriting import joint_settings as joint
from align.rewriting import settings as rewritings
from align.search import settings as searches
from alignflow import plugins
from alignflow.errors import ConfigError, Problem
from alignflow.settings import RunSettings


def _replaced(files: Sequence[Path]) -> Iterator[str]:
    """A line for every kind that a file replaces in the files to its left."""
    known: dict[str, tuple[str, str]] = {}
    for file in files:
        own: dict[str, tuple[str, str]] = {}
        for layer in read_layers(file):
            for key, value in layer.data.items():
                kind = value.get("kind") if isinstance(value, dict) else value
                if isinstance(kind, str):
                    own[key] = kind, layer.places.get((key, "kind"), layer.places.get((key,), ""))
        for key in known.keys() & own.keys() - {"name", "out", "latent_reward", "memory"}:
            (old, there), (new, here) = known[key], own[key]
            if old != new:
                yield f"note       {key}: {new} ({here}) replaces {old} ({there}) and its settings"
        known |= own


def examine(
    path: Files,
    overrides: Sequence[str] = (),
    memory: bool = False,
    card: str | None = None,
    run_code: bool = False,
) -> Iterator[str]:
    """Report of ``alignflow check`` on a config of any command, line by line; the last line is the verdict.

    Args:
        memory: whether to estimate the memory of a training run.
        card: size of the card that it has to fit, ``24gb``.
        run_code: whether to import custom rewards, recipes, searches and generators, which otherwise are only found.

    Raises:
        ConfigError: the config is invalid, does not fit the card, or is not for training and has no estimate of memory.
    """
    files = files_of(path)
    shown = said_of(files)
    root = roots_of(keys_of(read_layers(files)))[0]
    if memory and root is not Config:
        raise ConfigError(
            f"--memory and --card are for training runs; {shown} is a config for alignflow {root.command}"
        )
    with nullcontext() if run_code else plugins.unread():
        config = load_settings(files, overrides, root)
        found = named(config, run_code)
        if run_code and not found.problems:
            found.problems += undeclared(config)
        yield from _replaced(files)
        yield from map(line, _essentials(config))
        misfit = ""
        if memory and isinstance(config, Config):
            if is_unread(config.recipe):
                raise ConfigError("the memory of a recipe that was not imported is not known; use --import")
            told = fitting.lines(config, card)
            misfit = next((text for text in told if text.startswith(fitting.MISFIT)), "")
            yield from told
        _check_files(config, found.problems)
    if misfit:
        raise ConfigError(f"{shown} {misfit.partition(';')[0]}")
    yield from _verdict(shown, config, found)


def _essentials(config: RunSettings) -> list[tuple[str, str]]:
    return _room(config).essentials(config)  # type: ignore[attr-defined, no-any-return]


def _room(config: RunSettings) -> ModuleType:
    """The module that checks configs of this class."""
    rooms = {
        Config: check,
        searches.SearchConfig: searches,
        reasonings.ReasonConfig: reasonings,
        rewritings.RewritingSettings: rewritings,
        joint.JointConfig: joint,
    }
    return next((room for kind, room in rooms.items() if isinstance(config, kind)), preferences)


def _check_files(config: RunSettings, problems: list[Problem]) -> None:
    """Raise ConfigError for these problems and for every missing file."""
    try:
        _room(config).check_files(config)
    except ConfigError as error:
        problems = [*error.problems, *problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), config.name)


def _verdict(shown: str, config: RunSettings, found: Named) -> Iterator[str]:
    """Lines on what is not known, then the verdict."""
    generator, prompts = getattr(config, "generator", None), getattr(config, "prompts", None)
    away = [*(generator_away(generator) if generator is not None else []), *found.away]
    heldout = getattr(prompts, "heldout", None)
    if heldout is not None and heldout == getattr(prompts, "train", None):
        yield "note       prompts.heldout equals prompts.train, so held-out scores are of training prompts"
    yield from (f"hub        {where} {name} is not on this machine; the hub was not queried" for where, name in away)
    yield from (f"unknown    {text}" for text in found.unknown)
    if found.unknown:
        yield f"{shown}: no problems were found, but the lines marked unknown were not checked"
    else:
        yield f"{shown} {'is' if ' + ' not in shown else 'are'} ready to run"


def line(named: tuple[str, str]) -> str:
    """``prompts    shapes:train``."""
    return f"{named[0]:10} {named[1]}"
