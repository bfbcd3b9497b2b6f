"""YAML files and overrides -> :class:`Config`, and back. :mod:`align.config.settings` defines the settings.

Layers are merged in this order: the files that ``extends`` names, the file, the files to its right, the overrides. All
problems are reported at once, each with its dotted path, its place in a file and the allowed values.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from align.config import memory, yaml_text
from align.config.paths import absolute
from align.config.roots import check_command
from align.config.sampling import Sampler
from align.config.sections import RewardOnly
from align.config.settings import Config
from align.config.yaml_text import Limits, Places
from alignflow.errors import ConfigError, Problem
from alignflow.explain import explain
from alignflow.kinds import OneOf, child, child_options, class_of, flatten, mapping
from alignflow.paths import exists, expanded, is_dir, is_file, names
from alignflow.settings import RunSettings
from alignflow.text import first_line
from alignflow.words import brief, close, listing
from rewards.base import RewardSettings

__all__ = ["Config", "dump_config", "json_schema", "load_config", "load_reward", "read_yaml", "settings_of"]

FILES = (
    ("prompts", "source"),
    ("prompts", "train"),
    ("prompts", "heldout"),
    ("prompts", "rewrites"),
    ("rewriter", "config"),
    ("renderer", "config"),
    ("rollout", "file"),
    ("generator", "path"),
    ("data", "train"),
    ("data", "heldout"),
)
"""Settings that may name a file beside the config."""

Tree = TypeVar("Tree", bound=BaseModel)
Files = str | Path | Sequence[str | Path]
"""One config file, or several that are merged from left to right."""


@dataclass(frozen=True)
class Layer:
    """Settings of one file or override, and their places (path of keys -> ``file:line``)."""

    data: dict[str, Any]
    places: Places = field(default_factory=dict)


def load_config(path: Files, overrides: Sequence[str] = ()) -> Config:
    """Read config files, the files that they extend, and the overrides.

    Args:
        path: a YAML file, or several. Several are merged from left to right, as if another file extended them in this
            order.
        overrides: ``train.lr=1e-4``, later ones win; the value is YAML.

    Raises:
        ConfigError: the config is invalid; holds every problem.
    """
    return load_settings(path, overrides, Config)


def load_settings(path: Files, overrides: Sequence[str], root: type[Tree]) -> Tree:
    """Like :func:`load_config`, for any class of config."""
    files = files_of(path)
    layers = [*read_layers(files), *read_overrides(overrides)]
    data: dict[str, Any] = {}
    for layer in layers:
        below = with_preset(data, layer) if root is Config else data  # presets are for training
        data = merge(below, layer.data, [root])
    data.setdefault("name", default_name(files))
    try:
        return root.model_validate(data)
    except ValidationError as error:
        places = {key: place for layer in layers for key, place in layer.places.items()}
        if issubclass(root, RunSettings):
            each = {str(file): keys_of(read_layers(file)) for file in files}
            check_command(each, keys_of(layers), root)
        raise ConfigError(explain(error, root, data, places), said_of(files)) from None


def files_of(path: Files) -> list[Path]:
    """The config files as a list; raises ConfigError if there are none."""
    files = [Path(path)] if isinstance(path, str | Path) else [Path(file) for file in path]
    if not files:
        raise ConfigError("no config file was given")
    return files


def keys_of(layers: Iterable[Layer]) -> set[str]:
    """The sections of a config's layers."""
    return {key for layer in layers for key in layer.data}


def said_of(files: Sequence[Path]) -> str:
    """``a.yaml + b.yaml``, for messages."""
    return " + ".join(map(str, files))


def default_name(files: Sequence[Path]) -> str:
    """A run's name from the folder of its first config and the name of its last one.

    ``configs/flux-dev/nft.yaml`` is ``flux-dev-nft``, and with ``configs/shared/flow_rwr.yaml`` after it,
    ``flux-dev-flow_rwr``. The working folder and a folder called ``configs`` are left out.
    """
    folder, stem = Path(os.path.abspath(files[0])).parent, files[-1].stem
    words = [stem] if folder == Path.cwd() or folder.name in ("", "configs") else [folder.name, stem]
    return re.sub(r"[^\w.+-]+", "-", "-".join(words)).strip(".-")[:200] or "run"


def load_reward(text: str) -> RewardSettings:
    """A reward's settings from a kind, a YAML mapping in one line, or a file holding the mapping or ``reward: ...``.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    places: Places = {}
    if text.endswith((".yaml", ".yml")):
        layer = read_file(Path(text))
        data, places = layer.data.get("reward", layer.data), {("reward",): text}
    elif text.lstrip().startswith("{"):
        data = read_overrides([f"reward={text}"])[0].data["reward"]
    else:
        data = text
    try:
        return RewardOnly.model_validate({"reward": data}).reward
    except ValidationError as error:
        raise ConfigError(explain(error, RewardOnly, {"reward": data}, places)) from None


def validated(model: type[Tree], data: dict[str, Any]) -> Tree:
    """Settings from plain values.

    Raises:
        ConfigError: a setting is unknown or malformed.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, model, data, {})) from None


def settings_of(config: BaseModel) -> dict[str, Any]:
    """The whole config with its defaults, as plain values for YAML and JSON."""
    return config.model_dump(mode="json")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, without what it extends and not validated; raises ConfigError."""
    return read_file(Path(path)).data


def dump_config(config: BaseModel) -> str:
    """The whole config as YAML with absolute paths; loading it gives an equivalent config."""
    return dump_yaml(resolved_settings(config))


def dump_yaml(settings: Mapping[str, Any]) -> str:
    """Plain values as YAML in the order in which they stand."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    yaml.dump(dict(settings), stream)
    return stream.getvalue()


def resolved_settings(config: BaseModel) -> dict[str, Any]:
    """The content of :func:`dump_config` as plain values: paths are absolute, so it is valid in any working folder."""
    return absolute(settings_of(config))


def overridden(config: Config, override: str) -> Config:
    """The config with an override such as ``train.lr=1e-4``; raises ConfigError or ValidationError if it is invalid."""
    return Config.model_validate(merge(settings_of(config), read_overrides([override])[0].data, [Config]))


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors."""
    schema = Config.model_json_schema()
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"]["extends"] = {**names, "description": "config files this one builds on, relative to it"}
    settings = schema["properties"]["memory"]
    about = {"description": settings.pop("description"), "default": settings.pop("default", {})}
    schema["properties"]["memory"] = {"anyOf": [{"enum": list(memory.PRESETS)}, settings], **about}
    rewards = [option for option in schema["properties"]["reward"]["anyOf"] if option != {"type": "null"}]
    schema["$defs"]["RewardSettings"] = {"anyOf": rewards}  # what a reward made of rewards refers to
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)  # what a file leaves out may come from the one it extends
        for named in part.get("properties", {}).values():
            if isinstance(inner := named.get("additionalProperties"), dict):
                named["additionalProperties"] = {"anyOf": [inner, {"type": "null"}]}  # null removes an inherited one
    return schema


# -- reading ----------------------------------------------------------------------------------------------------------


def read_layers(path: Files) -> list[Layer]:
    """The layer of each file, after the layers of all files that it extends.

    A file that several files extend is read once; its last position counts.
    """
    reading, found = _Reading(Limits.of_environment()), dict[Path, Layer]()
    for file in files_of(path):
        _append(found, reading.layers(file))
    return list(found.values())


class _Reading:
    """One config and all files that it extends."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.known: dict[Path, dict[Path, Layer]] = {}

    def layers(self, path: Path, above: tuple[Path, ...] = ()) -> dict[Path, Layer]:
        """The layers of the files, in the order of merging."""
        here = Path(os.path.realpath(path)) if is_file(path) else path
        if here in above:
            names = " -> ".join(file.name for file in (*above[above.index(here) :], here))
            raise ConfigError(f"extends is circular: {names}", str(path))
        if here in self.known:
            return self.known[here]
        if max(len(self.known), len(above)) >= self.limits.files:
            said = f"a config extends at most {self.limits.files} files; ALIGNFLOW_CONFIG_FILES changes the limit"
            raise ConfigError([Problem("extends", said, str(path))])
        layer = read_file(path, extended_by=above[-1] if above else None)
        _beside(layer.data, path.parent)
        found: dict[Path, Layer] = {}
        for base in self.bases(layer):
            _append(found, self.layers(path.parent / expanded(base, ConfigError), (*above, here)))
        found[here] = layer
        self.known[here] = found
        return found

    def bases(self, layer: Layer) -> list[str]:
        """The files that a file extends; the key is removed from its settings."""
        extends = layer.data.pop("extends", [])
        bases = [extends] if isinstance(extends, str) else extends
        if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
            place = layer.places[("extends",)]
            said = f"should be a file name or a list of them, given {brief(bases)}"
            raise ConfigError([Problem("extends", said, place)])
        return bases


def _append(found: dict[Path, Layer], layers: Mapping[Path, Layer]) -> None:
    """Append the layers; a file that was found before moves to its new position."""
    for file, layer in layers.items():
        found.pop(file, None)
        found[file] = layer


def read_file(path: Path, extended_by: Path | None = None) -> Layer:
    """One YAML file and the line of every key."""
    if not is_file(path):
        because = f", which {extended_by.name} extends" if extended_by else ""
        near = [] if is_dir(path) else names(path.parent, ".yaml")
        meant = close(path.name, near)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        hint += f"{'' if meant else ';'} {path.parent} has {listing(near, path.name)}" if near else ""
        raise ConfigError(f"no config file {path!s:.300}{because} (looked in {Path.cwd()}){hint}")
    limits = Limits.of_environment()
    try:
        size = path.stat().st_size
        if size > 4 * limits.size:  # bytes; characters are counted when it is read
            said = f"{size:,} bytes are too many; ALIGNFLOW_CONFIG_SIZE changes the limit"
            raise ConfigError([Problem("", said, str(path))])
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", f"not readable as YAML: {error!s:.200}", str(path))]) from None
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be read: {error.strerror or first_line(error)}", str(path))]) from None
    data, places = yaml_text.read_lines(text, str(path), limits)
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds {type(data).__name__} {brief(data)}"
        raise ConfigError(f"{path}: {found}; a config is a mapping of settings, such as 'recipe: {{kind: nft}}'")
    return Layer(data, places)


def read_overrides(overrides: Sequence[str]) -> list[Layer]:
    """A layer for each override ``a.b=value``.

    Raises:
        ConfigError: lists every override that cannot be read.
    """
    layers, problems, limits = [], [], Limits.of_environment()
    for text in overrides:
        dotted, equals, value = text.partition("=")
        keys, place = tuple(dotted.strip().split(".")), f"override {text!r:.300}"
        if not equals or not all(keys):
            hint = f"; {text} is a file, and config files end in .yaml or .yml" if is_file(Path(text)) else ""
            problems.append(Problem("", f"an override reads key=value, such as train.lr=1e-4{hint}", place))
            continue
        if len(keys) > limits.depth:
            problems.append(Problem("", f"{len(keys)} nested keys; settings are not nested that deep", place))
            continue
        try:
            data, inside = yaml_text.read(value, lambda _, place=place: place, limits)  # type: ignore[misc]
        except ConfigError as error:
            for problem in error.problems:
                said = problem.message.replace("not readable as YAML", "the value is not YAML")
                problems.append(Problem(dotted[:300], said, place))
            continue
        for key in reversed(keys):
            data = {key: data}
        layers.append(Layer(data, {keys: place} | dict.fromkeys(((*keys, *path) for path in inside), place)))
    if problems:
        raise ConfigError(problems)
    return layers


def _beside(data: dict[str, Any], folder: Path) -> None:
    """Replace file names that exist beside the config, but not in the working folder, by paths that work."""
    for section, key in FILES:
        found = child(data.get(section), key)
        several: list[tuple[Any, str]] = [(one, "file") for one in found] if isinstance(found, list) else []
        for holder, name in several or [(data.get(section), key)]:
            file = child(holder, name)
            if holder and isinstance(file, str) and not exists(file) and exists(folder / file):
                plain = os.path.normpath(folder / file)  # another file where a folder on the way is a link
                same = exists(Path(plain)) and os.path.samefile(plain, folder / file)
                holder[name] = plain if same else str(folder / file)


def with_preset(data: dict[str, Any], layer: Layer) -> dict[str, Any]:
    """``data`` with the preset that the layer names as ``memory: 24gb``, which is removed from the layer.

    So a preset overrides the files that this one extends, and the file's own settings override the preset.
    """
    name = layer.data.get("memory")
    if not isinstance(name, str):
        return data
    del layer.data["memory"]
    found = memory.preset(name, layer.places.get(("memory",), ""))
    stored = child(data.get("rollout"), "kind") not in (None, "online")
    return merge(data, {key: value for key, value in found.items() if key != "rollout" or not stored}, [Config])


# -- merging ----------------------------------------------------------------------------------------------------------


def merge(base: Any, layer: Any, options: Sequence[Any]) -> Any:
    """``base`` updated with ``layer``, mappings key by key.

    If the layer changes the kind, settings of the old kind are dropped first. ``options`` are the types allowed here.
    """
    if any(isinstance(option, OneOf) for option in options):
        base, layer = mapping(base), mapping(layer)
    if not isinstance(layer, Mapping):
        return layer
    named = _holds_settings(options)
    base = base if isinstance(base, Mapping) else {}
    merged = dict(_kept(base, layer, options))
    for key, value in layer.items():
        if named and value is None:  # removes what the files below set
            merged.pop(key, None)
            continue
        merged[key] = merge(merged.get(key), value, child_options(options, {**merged, **layer}, key))
    return merged


def _holds_settings(options: Sequence[Any]) -> bool:
    """Whether the value is a mapping of names to settings, such as rewards or the parts of a mixture."""
    maps = [option for option in options if get_origin(option) in (dict, Mapping)]
    inside = [one for option in maps for one in flatten(get_args(option)[-1])]
    return any(isinstance(one, OneOf) or class_of(one, None) is not None for one in inside)


def _kept(base: Mapping[str, Any], layer: Mapping[str, Any], options: Sequence[Any]) -> Mapping[str, Any]:
    """The settings of ``base`` that remain valid for the layer's kind."""
    for option in options:
        if isinstance(option, OneOf) and "kind" in layer and layer["kind"] != option.kind_of(base):
            return {}
        if class_of(option, layer) is Sampler and layer.get("kind", base.get("kind")) != base.get("kind"):
            return {key: value for key, value in base.items() if key not in Sampler.per_kind}
    return base
