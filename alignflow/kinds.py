"""Settings whose class is selected by ``kind``, and lookup of the class at a dotted path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from alignflow.words import KINDS, close
from alignflow.words import listing as listing

Settings = type[BaseModel]


@dataclass(frozen=True)
class OneOf:
    """Marks a field that holds one of several settings classes: ``Annotated[Policy, OneOf(...)]``.

    Unlike pydantic's own discriminated union, ``kind`` may be left out where there is a default, the choices are
    listed when first needed, a kind with a colon reaches code outside the repository, and error paths hold no tags.

    Args:
        what: the word in messages, e.g. "recipe".
        choices: lists kind -> class.
        default: the kind where none is given.
        outside: makes settings from a mapping whose kind has a colon.
    """

    what: str
    choices: Callable[[], Mapping[str, Settings]]
    default: str | None = None
    outside: Callable[[dict[str, Any]], BaseModel] | None = None

    def kind_of(self, value: Any) -> Any:
        """The kind that is asked for, or the default."""
        value = mapping(value)
        return value.get("kind", self.default) if isinstance(value, Mapping) else None

    def pick(self, value: Any) -> Settings | None:
        """The class that is asked for, or None if that is not known."""
        kind = self.kind_of(value)
        return self.choices().get(kind) if isinstance(kind, str) else None

    def parse(self, value: Any) -> BaseModel:
        """A mapping, or the kind alone -> settings; settings pass through."""
        if isinstance(value, BaseModel):
            return value
        value = mapping(value)
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "not_settings",
                "should be a kind ({kinds}) or a mapping with one",
                {"kinds": self._kinds()},
            )
        kind = self.kind_of(value)
        if isinstance(kind, str) and ":" in kind and self.outside is not None:
            return self.outside(dict(value))
        cls = self.pick(value)
        if cls is None:
            raise problem_at("kind", self._unknown(kind), kind)
        return cls.model_validate(dict(value))

    def _kinds(self, given: Any = None) -> str:
        return listing(self.choices(), given, KINDS)

    def _unknown(self, kind: Any) -> str:
        if kind is None:
            return f"is missing; {self.what} kinds: {self._kinds()}"
        also = ", or package.module:name" if self.outside is not None else ""
        return f"no such {self.what}{nearest(kind, self.choices(), f'there are {self._kinds(kind)}{also}')}"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        options = [handler(cls.__pydantic_core_schema__) for cls in self.choices().values()]
        if self.outside is not None:
            kind = {"type": "string", "pattern": ":", "description": "package.module:name"}
            options.append({"type": "object", "properties": {"kind": kind}, "required": ["kind"]})
        return {"anyOf": [{"type": "string", "description": "the kind alone"}, *options]}


@cache
def from_outside(cls: type[Any]) -> type[Any]:
    """``cls`` with a kind that names where it was loaded from, ``package.module:name``.

    So a class that declares its own kind, ``Literal["mine"]``, works from a user's file as it does in its room.
    """
    declared = cls.model_fields.get("kind")
    if declared is None or get_origin(declared.annotation) is not Literal:
        return cls
    kind: Any = (str, ...)
    return create_model(cls.__name__, __base__=cls, __module__=cls.__module__, __doc__=cls.__doc__, kind=kind)


FAMILIES: dict[type, OneOf] = {}
"""Base class -> its mark, for fields of that class in settings declared elsewhere (the members of a mixture)."""


def mapping(value: Any) -> Any:
    """``nft`` as ``{kind: nft}``; anything else as it is."""
    return {"kind": value} if isinstance(value, str) else value


def _dump(value: BaseModel, info: core_schema.SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode)


def problem_at(path: str, message: str, value: Any = None) -> ValidationError:
    """A validation error at a dotted ``path`` below the settings that raise it."""
    return problems_at([(path, message)], value)


def problems_at(problems: Iterable[tuple[str, str]], value: Any = None) -> ValidationError:
    """One validation error holding several (dotted path, message)."""
    details: list[InitErrorDetails] = [
        InitErrorDetails(
            # braces of the message are its own, not a template's
            type=PydanticCustomError("setting", "{message}", {"message": message}),
            loc=tuple(path.split(".")) if path else (),
            input=value,
        )
        for path, message in problems
    ]
    return ValidationError.from_exception_data("Config", details)


def options_at(root: Settings, data: Any, path: Sequence[str | int]) -> list[Any]:
    """Possible types at ``path``: annotations and :class:`OneOf` marks; ``data`` decides the kinds on the way."""
    options: list[Any] = [root]
    for key in path:
        options = child_options(options, data, key)
        data = child(data, key)
    return options


def child_options(options: Iterable[Any], value: Any, key: str | int) -> list[Any]:
    """Possible types at ``value[key]`` if ``value`` is one of ``options``."""
    for option in options:
        cls = class_of(option, value)
        if cls is not None:
            field = cls.model_fields.get(str(key))
            if field is not None:
                marks = [mark for mark in field.metadata if isinstance(mark, OneOf)]
                return marks or flatten(field.annotation)
        elif isinstance(origin := get_origin(option), type):
            return flatten(get_args(option)[-1 if issubclass(origin, Mapping) else 0])
    return []


def child(value: Any, key: str | int) -> Any:
    """``value[key]``, or None if there is nothing of the kind."""
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, list | tuple) and str(key).isdecimal() and int(key) < len(value):
        return value[int(key)]
    return None


def class_of(option: Any, value: Any) -> Settings | None:
    """The settings class an option means for ``value``."""
    if isinstance(option, OneOf):
        return option.pick(value)
    return option if isinstance(option, type) and issubclass(option, BaseModel) else None


def flatten(annotation: Any) -> list[Any]:
    """Members of a union, marks instead of what they mark, containers as they are."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *metadata = get_args(annotation)
        return [mark for mark in metadata if isinstance(mark, OneOf)] or flatten(base)
    if origin in (Union, UnionType):
        return [option for part in get_args(annotation) for option in flatten(part)]
    return [FAMILIES.get(annotation, annotation)]


ALSO_CALLED = {
    "batch_size": "chunk",
    "cfg": "guidance",
    "eta": "noise_level",
    "group_size": "group",
    "guidance_scale": "guidance",
    "learning_rate": "lr",
    "lora_rank": "rank",
    "max_steps": "steps",
    "num_inference_steps": "steps",
    "r": "rank",
    "type": "kind",
    "weight": "strength",
}
"""Name of a setting in other tools -> its name here."""


def nearest(given: Any, known: Iterable[str], others: str) -> str:
    """`` 'lrr'; did you mean 'lr'? There are ...``, or `` 'lrr'; there are ...`` when nothing is near.

    Args:
        others: lists the names that are known, "there are ...".
    """
    known = list(known)
    alias = ALSO_CALLED.get(str(given))
    near = [alias] if alias in known else close(given, known)
    if near:
        return f" {given!r:.80}; did you mean {near[0]!r}? {others[:1].upper()}{others[1:]}"
    return f" {given!r:.80}; {others}"
