"""Strict settings: ``true`` is not a number, 1 is not a boolean, and every number is bounded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import PydanticCustomError, PydanticKnownError, core_schema

from alignflow.errors import ConfigError
from alignflow.explain import explain

LARGEST = 10**9
"""Bound of a whole number that has none of its own."""
LARGEST_FLOAT = 1e12
_REFERENCE = re.compile(r"\$\{\w+\}")
DAY = 86_400
"""Seconds; the longest that anything is waited for."""


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _truth(value: Any) -> Any:
    if not isinstance(value, bool | str) or value in ("0", "1"):
        raise PydanticKnownError("bool_type")
    return value


_number_of = {"int": _whole, "float": _number}


def _strict(schema: Any) -> Any:
    """The schema with its numbers and booleans made strict, wherever they are in it."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_strict, schema))
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind in ("int", "float"):
        limit = LARGEST if kind == "int" else LARGEST_FLOAT
        upper = {} if {"le", "lt"} & schema.keys() else {"le": limit}
        lower = {} if {"ge", "gt"} & schema.keys() else {"ge": -limit}
        inner = {**schema, **upper, **lower}
        return core_schema.no_info_before_validator_function(_number_of[kind], inner)  # type: ignore[arg-type]
    if kind == "bool":
        return core_schema.no_info_before_validator_function(_truth, schema)  # type: ignore[arg-type]
    if kind == "function-before" and schema["function"].get("function") in (_whole, _number, _truth):
        return schema  # made strict already, in a class that this one holds
    return {key: value if key in ("metadata", "serialization", "default") else _strict(value)
            for key, value in schema.items()}  # fmt: skip


class Strict(BaseModel):
    """Base of settings: no boolean where a number belongs, no number where a boolean does; every number is bounded.

    Raises:
        ConfigError: settings that Python code makes are wrong. Settings read from data (``model_validate``) raise
            pydantic's ValidationError, which the reader of a config explains with the places in its files.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old name -> new name of settings of this class; a new name with a dot is a path from the root of the config."""

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            cls = type(self)
            places: dict[tuple[str, ...], str] = {(name,): cls.__name__ for name in (*cls.model_fields, *data)}
            raise ConfigError(explain(error, cls, data, places), cls.__name__) from None

    # as on pydantic's own: validation makes objects without it, so errors of a part keep their place in the whole
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return _strict(handler(source))


def _address(url: str) -> str:
    """``url`` itself, where it is http(s)://host[:port][/path]; ``${NAME}`` may stand for any part of it."""
    try:
        parts = urlsplit(_REFERENCE.sub("1", url))  # a number may be anywhere
        good = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0 and url.isprintable()
        )
    except ValueError:
        good = False
    if not good or " " in url or not url.isprintable():
        raise PydanticCustomError("setting", "is not an address of a server, such as http://127.0.0.1:8300")
    if "@" in parts.netloc and not _REFERENCE.search(url.partition("@")[0]):
        message = "holds a name and password, which would be written into every run; use token_env"
        raise PydanticCustomError("setting", message)
    if parts.query or parts.fragment:
        raise PydanticCustomError("setting", "ends in ? or #; secrets belong in token_env")
    return url


def _named(values: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in values:
        if not name or name != name.strip() or len(name) > 80 or not all(c.isprintable() and c != "/" for c in name):
            message = (
                "{name} is not a valid name: use 1 to 80 printable characters without a slash, with no "
                "space at either end"
            )
            raise PydanticCustomError("setting", message, {"name": f"{name!r:.90}"})  # type: ignore[arg-type]
    return values


Address = Annotated[str, AfterValidator(_address)]
"""``http://host:port/...`` without a name and password, a query or a fragment."""
Named = AfterValidator(_named)
"""Mark of a mapping whose keys are names that people choose; they become columns, curves and file names."""
Word = Annotated[str, Field(pattern=r"\S")]
"""Text that is not blank."""
Seconds = Annotated[float, Field(gt=0, le=DAY)]
"""A time that may be waited."""
