"""Pydantic's errors in the terms of the config file: dotted path, place, given value, allowed values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from alignflow.errors import Problem
from alignflow.kinds import OneOf, Settings, child, class_of, listing, nearest, options_at
from alignflow.renamed import new_name
from alignflow.words import brief

MOST = 50  # problems that are shown at once

WORDS = {
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "string_type": "should be text",
    "list_type": "should be a list [a, b]",
    "tuple_type": "should be a list [a, b]",
    "dict_type": "should be a mapping",
    "model_type": "should be a mapping",
    "invalid_key": "a setting's name should be text",
    "finite_number": "should be a finite number",
    "missing": "is missing",
}
"""Error type -> message where pydantic's own talks of Python."""


def explain(error: ValidationError, root: Settings, data: Any, places: Mapping[tuple[str, ...], str]) -> list[Problem]:
    """Every problem of a failed validation of ``data`` against ``root``.

    What is missing because of a kind has the place that sets the kind.
    """
    problems: dict[Problem, None] = {}
    details = error.errors(include_url=False)
    for detail in details[:MOST]:
        path = strip_tags(detail["loc"], data)
        keys = tuple(str(key) for key in path)
        message = _message(detail, root, data, path) + _set_elsewhere(detail, keys, places)
        kind = places.get((*keys[:-1], "kind")) if detail["type"] == "missing" else None
        problems[Problem(".".join(keys), message, kind or _place(keys, places))] = None
    if len(details) > MOST:
        problems[Problem("", f"and {len(details) - MOST} more problems")] = None
    return list(problems)


def _set_elsewhere(detail: Any, keys: tuple[str, ...], places: Mapping[tuple[str, ...], str]) -> str:
    """The file that sets a kind without this setting, if it is another file than the setting's; empty otherwise."""
    if detail["type"] != "extra_forbidden":
        return ""
    kind = places.get((*keys[:-1], "kind"), "")
    here = _place(keys, places)
    return f" (kind is set in {kind})" if kind and here and kind.rpartition(":")[0] != here.rpartition(":")[0] else ""


def strip_tags(loc: Sequence[str | int], data: Any) -> tuple[str | int, ...]:
    """The error's location without what pydantic adds for members of a union."""
    path: list[str | int] = []
    for i, key in enumerate(loc):
        inside = isinstance(data, Mapping | list | tuple)
        if not inside or (isinstance(data, Mapping) and key not in data and i + 1 < len(loc)):
            continue
        path.append(key)
        data = child(data, key)
    return tuple(path)


def _message(detail: Any, root: Settings, data: Any, path: tuple[str | int, ...]) -> str:
    if detail["type"] == "extra_forbidden":
        return _unknown(path, options_at(root, data, path[:-1]), _at(data, path[:-1]))
    if detail["type"] == "setting":
        return detail["msg"]
    message = WORDS.get(detail["type"]) or re.sub(r"^(Value error, |[A-Z]\w+ (?=should))", "", detail["msg"])
    return message if detail["type"] == "missing" else f"{message}, given {_given(detail['input'])}"


def _given(value: Any) -> str:
    """A value as YAML, cut if it is long."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else brief(value)


def _unknown(path: Sequence[str | int], options: Sequence[Any], siblings: Any) -> str:
    """Message for a key that its settings do not have: renamed, another kind's, misspelt, or unknown."""
    key = str(path[-1])
    rewards = any(isinstance(option, OneOf) and option.what == "reward" for option in options)
    if rewards and ":" in str(child(siblings, "kind")):
        return f"no such setting; arguments of a reward of your own go under options: {{{key:.80}: ...}}"
    for option in options:
        cls = class_of(option, siblings)
        if cls is None:
            continue
        if new := new_name(cls, key):
            return f"is now {new if '.' in new else '.'.join([*map(str, path[:-1]), new])}"
        if isinstance(option, OneOf):
            others = [kind for kind, other in option.choices().items() if key in other.model_fields]
            if others:
                return f"only valid for kind={' or '.join(others)}; here kind is {option.kind_of(siblings)}"
        known = list(cls.model_fields)
        if key in known:  # another member of the union was meant
            continue
        return f"no such setting{nearest(key, known, f'known here: {listing(known)}')}"
    return "no such setting"


def _at(data: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        data = child(data, key)
    return data


def _place(keys: tuple[str, ...], places: Mapping[tuple[str, ...], str]) -> str:
    """The place where the setting, or the nearest one around it, was written."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in places:
            return places[keys[:length]]
    return ""
