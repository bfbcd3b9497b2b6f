"""YAML text -> plain values and the line of every key, within limits on time and memory."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from alignflow.errors import ConfigError, Problem
from alignflow.text import first_line

Places = dict[tuple[str, ...], str]
CORE = "tag:yaml.org,2002:"
NUMBER = 100
"""Characters of a number; nothing here counts so far."""


@dataclass(frozen=True)
class Limits:
    """Limits on the size of a config. Each can be set by an environment variable, ``ALIGNFLOW_CONFIG_SIZE=1000000``.

    Args:
        size: characters of a file or of an override.
        depth: nesting of mappings and lists.
        values: number of values after every ``*alias`` and ``<<`` is expanded.
        files: total number of files that one config extends.
    """

    size: int = 256 * 1024
    depth: int = 50
    values: int = 20_000
    files: int = 100

    @classmethod
    def of_environment(cls) -> Limits:
        """The defaults, or the values of environment variables.

        Raises:
            ConfigError: a variable is not a positive whole number.
        """
        found = {}
        for name in cls.__dataclass_fields__:
            variable = f"ALIGNFLOW_CONFIG_{name.upper()}"
            text = os.environ.get(variable, "").strip()
            if text and not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
                raise ConfigError(f"environment variable {variable} should be a positive whole number, given {text!r}")
            if text:
                found[name] = int(text)
        return cls(**found)


def read(text: str, place: Callable[[int], str], limits: Limits | None = None) -> tuple[Any, Places]:
    """The value in ``text``, and path of keys -> place of every key in its mappings.

    Tags beyond YAML's core schema are errors; a date is read as text.

    Args:
        place: line number (from 1) -> its name in messages, ``run.yaml:3``.

    Raises:
        ConfigError: not YAML, or beyond the limits; names the place.
    """
    limits = limits or Limits.of_environment()
    if len(text) > limits.size:
        raise _over("size", f"{len(text):,} characters", limits, place(1))
    try:
        _measure(text, place, limits)
        yaml = YAML(typ="safe", pure=True)
        node = yaml.compose(text)
        places: Places = {}
        return _Values(yaml, place, places).value(node, ()) if node is not None else None, places
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place(mark.line + 1) if mark is not None else place(1)
        raise ConfigError([Problem("", _complaint(error), where)]) from None
    except (YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        raise ConfigError([Problem("", f"not readable as YAML: {first_line(error)}", place(1))]) from None


def read_lines(text: str, path: str, limits: Limits) -> tuple[Any, Places]:
    """:func:`read` for the text of a file, with places such as ``run.yaml:3``."""
    return copy.deepcopy(_read_lines(text, path, limits))


@functools.lru_cache(maxsize=64)
def _read_lines(text: str, path: str, limits: Limits) -> tuple[Any, Places]:
    """Kept, because the configs of a sweep extend the same files, and a command reads a config more than once."""
    return read(text, lambda line: f"{path}:{line}", limits)


def _over(limit: str, given: str, limits: Limits, place: str) -> ConfigError:
    most = f"{getattr(limits, limit):,}"
    words = {"size": "characters", "depth": "levels of nesting", "values": "values with every alias written out"}
    said = f"{given}; a config has at most {most} {words[limit]}; ALIGNFLOW_CONFIG_{limit.upper()} changes the limit"
    return ConfigError([Problem("", said, place)])


def _measure(text: str, place: Callable[[int], str], limits: Limits) -> None:
    """Raise ConfigError for text that is too deep or too large with all aliases expanded, before it is expanded."""
    sizes: dict[str, int] = {}
    inside: list[tuple[str | None, int]] = []  # anchor of each open collection, values counted when it began
    count = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if isinstance(event, CollectionEndEvent):
            anchor, before = inside.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, AliasEvent):
            if event.anchor in (anchor for anchor, _ in inside):
                said = f"an alias (*{event.anchor}) is inside the value that it names"
                raise ConfigError([Problem("", said, place(line))])
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, NodeEvent):
            if isinstance(event, CollectionStartEvent):
                inside.append((event.anchor, count))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
            count += 1
        if len(inside) > limits.depth:
            raise _over("depth", "more", limits, place(line))
        if count > limits.values:
            raise _over("values", "more", limits, place(line))


class _Values:
    """Converter of nodes to plain values, which also fills in ``places``."""

    def __init__(self, yaml: YAML, place: Callable[[int], str], places: Places) -> None:
        self.constructor, self.place, self.places = yaml.constructor, place, places

    def value(self, node: Node, path: tuple[str, ...]) -> Any:
        kind = node.tag.removeprefix(CORE) if node.tag else ""
        if isinstance(node, MappingNode) and kind == "map":
            return self.mapping(node, path)
        if isinstance(node, SequenceNode) and kind == "seq":
            return [self.value(inside, (*path, str(index))) for index, inside in enumerate(node.value)]
        if isinstance(node, ScalarNode) and kind in ("null", "bool", "int", "float", "str", "timestamp", "value"):
            return self.scalar(node, kind)
        raise self.wrong(node, f"the tag {node.tag!r:.80} is not for configs; text, numbers, lists and mappings are")

    def scalar(self, node: ScalarNode, kind: str) -> Any:
        if kind == "null":
            return None
        if kind in ("str", "timestamp", "value"):
            if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
                raise self.wrong(node, f"{node.value!r:.80} holds a NUL or half a character, which no file can")
            return node.value
        if len(node.value) > NUMBER:
            raise self.wrong(node, f"a number of {len(node.value):,} characters; at most {NUMBER}")
        try:
            return getattr(self.constructor, f"construct_yaml_{kind}")(node)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
            words = {"bool": "true or false", "int": "a whole number", "float": "a number"}
            raise self.wrong(node, f"{node.value!r:.80} is not {words[kind]}, as its tag requires") from None

    def mapping(self, node: MappingNode, path: tuple[str, ...]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        for key, inside in node.value:
            if not isinstance(key, ScalarNode):
                raise self.wrong(key, "a setting's name should be text")
            if key.tag == f"{CORE}merge":
                for base in self.bases(inside, path):
                    merged = {**base, **merged}
        for key, inside in node.value:
            if key.tag == f"{CORE}merge":
                continue
            name = self.value(key, path)
            if name in found:
                raise self.wrong(key, f'found duplicate key "{key.value:.80}"; each setting once')
            keys = (*path, str(name))
            self.places[keys] = self.place(key.start_mark.line + 1)
            found[name] = self.value(inside, keys)
        return {**merged, **found}

    def bases(self, node: Node, path: tuple[str, ...]) -> Iterator[dict[Any, Any]]:
        """The mappings that ``<<`` merges."""
        for inside in node.value if isinstance(node, SequenceNode) else [node]:
            if not isinstance(inside, MappingNode):
                raise self.wrong(inside, "<< takes a mapping or a list of mappings")
            yield self.mapping(inside, path)

    def wrong(self, node: Node, message: str) -> ConfigError:
        line = node.start_mark.line + 1 if node.start_mark is not None else 1
        return ConfigError([Problem("", f"not readable as YAML: {message}", self.place(line))])


def _complaint(error: MarkedYAMLError) -> str:
    """The parser's error in one line."""
    complaint = " ".join((error.problem or "not YAML").split())
    hint = "; indent with spaces" if "\\t" in complaint else ""
    return f"not readable as YAML: {complaint:.300}{hint}"
