"""Settings in words: type, default and meaning of every field, for reference pages and ``alignflow show``."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from alignflow.kinds import OneOf
from rewards.base import RewardSettings

BOUNDS = {"ge": "from {}", "min": "from {}", "gt": "above {}", "le": "to {}", "max": "to {}", "lt": "below {}"}
BOUNDS["multiple_of"] = "in steps of {}"
NAMES: dict[Any, str] = {
    type(None): "null", Any: "any value", Path: "path",
    bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping",
}  # fmt: skip


def choice_of(field: FieldInfo) -> OneOf | None:
    """The kinds that a setting chooses from; None for a setting without kinds, and for lists of them."""
    marks = [*field.metadata]
    for part in get_args(field.annotation):
        marks += part.__metadata__ if get_origin(part) is Annotated else []
    found = [mark for mark in marks if isinstance(mark, OneOf)]
    return found[0] if found and get_origin(field.annotation) not in (dict, list) else None


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """Settings classes in a type."""
    parts = [annotation, *get_args(annotation)]
    parts += [inner for part in parts for inner in get_args(part)]
    return [*dict.fromkeys(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))]


def type_of(annotation: Any, metadata: Any = ()) -> str:
    """A type in words: ``integer >= 1``, ``"a" or "b"``, ``list of text``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(args[0], [inner for one in args[1:] for inner in getattr(one, "metadata", [one])])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_of(part, metadata if part in (int, float) else ()) for part in args))
    if origin is tuple:
        words = [type_of(part) for part in args if part is not ...]
        if ... in args:
            return f"list of {words[0]}"
        return f"list of {len(words)}: {words[0]}" if len(set(words)) == 1 else f"[{', '.join(words)}]"
    if origin in (list, set, frozenset):
        return f"list of {type_of(args[0])}"
    if origin is dict:
        return f"mapping of name to {type_of(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "reward" if issubclass(annotation, RewardSettings) else "mapping"
    bounds = [BOUNDS[name].format(value) for one in metadata for name, value in bounds_of(one)]
    return " ".join([NAMES.get(annotation, getattr(annotation, "__name__", str(annotation))), *bounds])


def bounds_of(mark: Any) -> list[tuple[str, float]]:
    """(name, number) of the bounds in the metadata of a field."""
    found = [(name, getattr(mark, name, None)) for name in BOUNDS]
    return [(name, value) for name, value in found if isinstance(value, int | float)]


def default_of(field: FieldInfo) -> str:
    """The default between backticks, ``*required*``, or nothing where the description says it."""
    value = field.default_factory() if field.default_factory is not None else field.default  # type: ignore[call-arg]
    if value is PydanticUndefined:
        return "" if "default:" in (field.description or "") else "*required*"
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{given}`" if given else ""
    return f"`{plain(value)}`"


def plain(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(plain(one) for one in value)}]"
    text = str(value)
    return text if len(text) <= 60 and text.strip() else repr(text if len(text) <= 60 else f"{text[:57]}...")


def one_line(text: str) -> str:
    """Text without line breaks, with single backticks."""
    return re.sub(r"\s+", " ", text).strip().replace("``", "`")
