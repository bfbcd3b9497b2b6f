"""Completion of a command line's overrides: settings by their dotted names, kinds and other values. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.config.command_line import files_and_overrides
from align.config.describe import choice_of, default_of, models_of
from align.config.load import merge, read_layers, read_overrides
from align.config.roots import roots_of
from alignflow.errors import AlignflowError

Found = list[tuple[str, str]]
"""A possible word of the command line, and one line about it."""


def complete(command: str, words: Sequence[str], start: str) -> Found:
    """Completions of the word that begins with ``start``.

    Args:
        command: name of the command.
        words: config and overrides before it.
    """
    before = _joined([word for word in words if not word.startswith("-")])
    if start == "=" and before:  # bash divides words at the sign
        return list(_values(*_split(command, before[:-1]), before[-1], ""))
    if before and before[-1].endswith("="):
        return list(_values(*_split(command, before[:-1]), before[-1].removesuffix("="), start))
    root, data = _split(command, before)
    key, sign, value = start.partition("=")
    if sign:
        return [(f"{key}={one}", said) for one, said in _values(root, data, key, value)]
    found = list(_keys(root, data, key))
    while len(found) == 1 and found[0][0].endswith("."):
        found = list(_keys(root, data, found[0][0]))
    if len(found) == 1 and found[0][0].endswith("="):  # the whole setting, for there is one
        key = found[0][0].removesuffix("=")
        return [(f"{key}={one}", said) for one, said in _values(root, data, key, "")] or found
    return found


def _joined(words: Sequence[str]) -> list[str]:
    """Words in which bash's ``train.lr``, ``=``, ``1e-4`` are one; the last may lack its value."""
    found: list[str] = []
    for word in words:
        if found and (word == "=" or (found[-1].endswith("=") and "=" not in word)):
            found[-1] += word
        else:
            found.append(word)
    return found


def _split(command: str, words: Sequence[str]) -> tuple[type[BaseModel], Mapping[str, Any]]:
    """The settings class of a command and what is set so far; nothing of files that cannot be read."""
    from align.config.settings import Config
    from align.search.settings import SearchConfig

    root: type[BaseModel] = SearchConfig if command == "search" else Config
    data: dict[str, Any] = {}
    try:
        files, overrides = files_and_overrides(words[0], [word for word in words[1:] if "=" in word])
        layers = [*read_layers(files if Path(files[0]).suffix else [Path(files[0]) / "config.yaml"])]
        layers += read_overrides(overrides)
        for layer in layers:
            data = merge(data, layer.data, [root])
        if command == "check" and len(roots := roots_of(data)) == 1:
            root = roots[0]
    except (AlignflowError, IndexError):
        pass
    return root, data


def _keys(root: type[BaseModel], data: Mapping[str, Any], start: str) -> Iterator[tuple[str, str]]:
    """Settings whose dotted name begins so: a section ends in a dot, another setting in an equals sign."""
    path, _, name = start.rpartition(".")
    cls, inside = _at(root, data, path.split(".") if path else [])
    for field, info in cls.model_fields.items() if cls is not None else ():
        if field.startswith(name):
            dotted = f"{path}.{field}" if path else field
            section = _class_of(info, inside.get(field)) is not None
            yield f"{dotted}{'.' if section else '='}", info.description or ""


def _values(root: type[BaseModel], data: Mapping[str, Any], key: str, start: str) -> Iterator[tuple[str, str]]:
    """Values of a setting that begin so: kinds, the values that there are, else its default."""
    path, _, name = key.rpartition(".")
    steps = path.split(".") if path else []
    cls, _ = _at(root, data, steps)
    if name == "kind":
        section = _field(root, data, steps)
        choice = choice_of(section) if section is not None else None
        if choice is not None:
            known = dict(choice.choices())
            yield from ((kind, _first(one)) for kind, one in known.items() if kind.startswith(start))
            return
    info = cls.model_fields.get(name) if cls is not None else None
    if info is None:
        return
    fixed = [*_literals(info.annotation)] or [default_of(info).strip("`*")]
    found = [value for value in fixed if value.startswith(start) and value not in ("", "required")]
    yield from ((value, info.description or "") for value in found)


def _literals(annotation: Any) -> Iterator[str]:
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from _literals(part)


def _at(
    root: type[BaseModel], data: Mapping[str, Any], path: Sequence[str]
) -> tuple[type[BaseModel] | None, Mapping[str, Any]]:
    """The settings class at a dotted path, and what is set there."""
    if not path:
        return root, data
    info, value = _field(root, data, path), _set(data, path)
    return (None, {}) if info is None else (_class_of(info, value), value if isinstance(value, Mapping) else {})


def _set(data: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The value at a dotted path, None where nothing is set."""
    value: Any = data
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _field(root: type[BaseModel], data: Mapping[str, Any], path: Sequence[str]) -> FieldInfo | None:
    """The field at a dotted path; a name that the user chose, as of a reward, is a field of the mapping's type."""
    cls: type[BaseModel] | None = root
    info: FieldInfo | None = None
    for number, step in enumerate(path):
        if info is not None and get_origin(info.annotation) is dict:
            info = FieldInfo.from_annotation(get_args(info.annotation)[-1])
        else:
            info = cls.model_fields.get(step) if cls is not None else None
        if info is None:
            return None
        cls = _class_of(info, _set(data, path[: number + 1]))
    return info


def _class_of(info: FieldInfo, value: Any) -> type[BaseModel] | None:
    """The settings class of a section; None for another setting, and where its kind is not known."""
    choice = choice_of(info)
    if choice is not None:
        found: Any = choice.pick(value if value is not None else {})
        return found or (next(iter(choice.choices().values())) if choice.default is None else None)  # type: ignore[return-value]
    models = models_of(info.annotation)
    return models[0] if len(models) == 1 and get_origin(info.annotation) is not list else None


def _first(cls: Any) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]
