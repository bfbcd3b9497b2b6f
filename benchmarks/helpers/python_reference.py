"""``docs/reference/python.md``: the public functions and classes with their docstrings, for :mod:`benchmarks.pages`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import alignflow

PARTS: dict[str, list[str]] = {
    "Generators": ["generators.load:load", "generators.base:Generator", "generators.base:Conditioning"],
    "Rewards": ["rewards:parse", "rewards.base:Reward", "rewards.base:Scores", "rewards.base:RewardSettings"],
    "Search": ["align.search.base:Method", "align.search.task:Task", "align.search.particles:Particles"],
    "Recipes": ["align.recipes.base:Recipe", "align.rollout.bench:Bench"],
}
MATHS = ("losses", "samplers", "advantages", "weights", "pairs", "matching", "seeds")
STARS = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):$")


def page() -> str:
    """The text of the page."""
    lines = ["# Python API", "", "Written by `python -m benchmarks.pages` from the docstrings.", ""]
    lines += ["## alignflow", "", "`import alignflow` loads neither torch nor diffusers; each name loads on first use."]
    for name in alignflow.__all__:
        lines += _entry(f"alignflow.{name}", getattr(alignflow, name))
    for title, places in PARTS.items():
        lines += ["", f"## {title}"]
        for place in places:
            where, name = place.split(":")
            lines += _entry(f"{where}.{name}", getattr(importlib.import_module(where), name))
    for name in MATHS:
        module = importlib.import_module(f"align.maths.{name}")
        lines += ["", f"## align.maths.{name}", "", *_prose(inspect.getdoc(module) or "")]
        for key, value in vars(module).items():
            public = inspect.isfunction(value) and not key.startswith("_") and value.__module__ == module.__name__
            lines += _entry(key, value) if public else ()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _entry(name: str, value: Any, level: int = 3) -> Iterator[str]:
    yield from ("", f"{'#' * level} {name}", "")
    if inspect.isclass(value) and issubclass(value, Exception):
        yield from _prose(inspect.getdoc(value) or "")
        return
    if not inspect.isclass(value):
        yield from ("```text", _signature(name, value), "```", "")
    yield from _prose(inspect.getdoc(value) or "")
    if inspect.isclass(value):
        for key, one in vars(value).items():
            method = inspect.unwrap(getattr(one, "__func__", one))
            if not key.startswith("_") and inspect.isfunction(method) and method.__doc__:
                yield from _entry(f"{value.__name__}.{key}", method, level + 1)


def _signature(name: str, value: Any) -> str:
    called, name = inspect.signature(value), name.rpartition(".")[2]
    parts: list[str] = []
    for key, one in called.parameters.items():
        if one.kind is one.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        if key not in ("self", "cls"):
            stars = STARS.get(one.kind.name, "")
            parts.append(f"{stars}{key}{_annotation(one.annotation, ': ')}")
            parts[-1] += "" if one.default is one.empty else f" = {one.default!r}"
    result = _annotation(called.return_annotation, " -> ")
    line = f"{name}({', '.join(parts)}){result}"
    return line if len(line) <= 100 else "\n    ".join([f"{name}(", *(f"{part}," for part in parts)]) + f"\n){result}"


def _annotation(value: Any, before: str) -> str:
    return "" if value is inspect.Signature.empty else f"{before}{getattr(value, '__name__', value)}".replace("'", "")


def _prose(doc: str) -> Iterator[str]:
    """A docstring as Markdown: sections become lists, roles become code, examples become blocks."""
    doc = re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", doc).replace("``", "`")
    section = False
    for paragraph in doc.split("\n\n"):
        lines = paragraph.splitlines()
        if lines and lines[0].startswith(">>>"):
            yield from ("```pycon", *lines, "```", "")
        elif lines and (head := SECTION.match(lines[0])):
            section = True
            items = _whole(lines[1:]) if head[1] == "Returns" else _items(lines[1:])
            yield from (f"*{head[1]}*", "", *items, "")
        elif section and all(line.startswith("    ") for line in lines):
            yield from (*_items(lines), "")
        else:
            yield from (*(line.strip() for line in lines), "")


def _items(lines: list[str]) -> Iterator[str]:
    """``name: text`` with continuation lines -> list items."""
    for line in lines:
        deeper = line.startswith(" " * 8)
        name, colon, text = line.strip().partition(": ")
        if not deeper and colon and re.fullmatch(r"[\w.*, ]+", name):
            yield f"- `{name}`: {text}"
        else:
            yield f"  {line.strip()}" if deeper else f"- {line.strip()}"


def _whole(lines: list[str]) -> Iterator[str]:
    """Lines that describe one thing -> one list item."""
    for number, line in enumerate(lines):
        yield f"{'  ' if number else '- '}{line.strip()}"
