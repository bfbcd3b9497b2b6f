"""One kind in words for ``alignflow show``: description, settings, source, a line of a config. No torch."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from align.config import registry
from align.config.describe import choice_of, default_of, type_of
from align.recipes.base import Recipe
from align.search.base import Method
from alignflow.errors import ConfigError
from alignflow.kinds import nearest
from alignflow.terminal import table
from alignflow.words import listing
from alignflow.worlds.shapes import WORLDS
from generators.settings import Options
from rewards.base import RewardSettings

ROOMS = ("recipe", "reward", "search", "generator", "sampler", "world")
_SOURCE = re.compile(r"arXiv [\d., and]*\d")


def kinds(room: str) -> list[str]:
    """Names in a room.

    Raises:
        ConfigError: there is no such room.
    """
    if room == "world":
        return [*WORLDS]
    found = registry.summary()
    places = {"recipe": "recipes", "reward": "rewards", "generator": "generators", "sampler": "samplers"}
    if room not in ROOMS:
        raise ConfigError(f"no room{nearest(room, ROOMS, f'there are {listing(ROOMS)}')}")
    return [*found[places.get(room, room)]]


def show(room: str, name: str) -> str:
    """A page on one kind.

    Raises:
        ConfigError: there is no such room, or no such kind in it.
    """
    known = kinds(room)
    if name not in known:
        raise ConfigError(f"no {room}{nearest(name, known, f'there are {listing(known, name)}')}")
    if room == "generator":
        return _generator(name)
    if room == "world":
        return _world(name)
    if room == "sampler":
        return f"sampler {name}\n{registry.SAMPLERS[name]}\n\nexample\n  sampler: {{kind: {name}, steps: 20}}"
    return _settings(room, name)


def _settings(room: str, name: str) -> str:
    """Description of a kind whose settings are a class."""
    rooms: dict[str, tuple[Mapping[str, type[BaseModel]], type[BaseModel]]] = {
        "recipe": (registry.recipes(), Recipe),
        "reward": (registry.rewards(), RewardSettings),
        "search": (registry.searches(), Method),
    }
    cls, base = rooms[room][0][name], rooms[room][1]
    text = inspect.cleandoc(cls.__doc__ or "").replace("``", "`")
    lines = [f"{room} {name}", text, ""]
    if room == "reward":
        gradient, scope = registry.reward_columns()[name]
        lines += [f"gradient to the media: {gradient}; scored together: {scope}", ""]
    if needs := getattr(cls, "needs", ()):
        lines += [f"needs of the run: {', '.join(needs)}", ""]
    rows = _rows(cls)
    lines += (
        ["settings", table(["  setting", "value", "default", "meaning"], rows), ""] if rows else ["no settings", ""]
    )
    shared = sorted(set(base.model_fields) & set(cls.model_fields) - {"kind"})
    lines += [f"shared with every {room}: {', '.join(shared)}", ""] if shared else []
    required = [row[0].strip() for row in rows if row[2] == "required"]
    given = "".join(f", {one}: ..." for one in required)
    lines += ["example", f"  {room}: {{kind: {name}{given}}}", ""]
    if papers := _SOURCE.findall(text):
        lines.append(f"source: {'; '.join(papers)}")
    return "\n".join([*lines, f"code: {cls.__module__.replace('.', '/')}.py"])


def _rows(cls: type[BaseModel]) -> list[list[str]]:
    bases = {"kind", *Recipe.model_fields, *Method.model_fields}
    rows = []
    for name, field in cls.model_fields.items():
        if name in bases:
            continue
        choice = choice_of(field)
        value = choice.what if choice is not None else type_of(field.annotation, field.metadata)
        default = default_of(field).strip("*")
        rows.append([f"  {name}", *(one.replace("`", "") for one in (value, default)), field.description or ""])
    return rows


def _generator(name: str) -> str:
    file = Path(registry.ADAPTERS) / f"{name}.py"
    text = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").replace("``", "`")
    accepts = registry.declared(name, "accepts") or ("size", "negative_prompt")
    fields = {key: field for key, field in Options.model_fields.items() if key in accepts}
    rows = [[f"  {key}", type_of(one.annotation, one.metadata), one.description or ""] for key, one in fields.items()]
    needed = registry.inputs(name)
    lines = [f"generator {name}", text, "", f"pipeline: {registry.declared(name, 'pipeline_class')}"]
    lines += [f"prompts need: {', '.join(needed)}"] if needed else []
    lines += ["", "settings of this model", table(["  setting", "value", "meaning"], rows), ""]
    lines += ["example", f"  generator: {{kind: {name}, path: FOLDER_OR_HUB_ID}}", ""]
    return "\n".join([*lines, f"code: generators/adapters/{name}.py"])


def _world(name: str) -> str:
    generators = ", ".join(WORLDS[name])
    return "\n".join(
        [
            f"world {name}",
            "Embedded world: captioned scenes of coloured shapes, a small model that draws them, and a verifier.",
            "",
            f"generators: {generators}",
            f"prompts: {name}:train, {name}:heldout",
            "",
            "example",
            f"  generator: {{kind: {WORLDS[name][0]}, path: shapes, device: cpu}}",
            f'  prompts: {{train: "{name}:train", heldout: "{name}:heldout"}}',
            f"  reward: {{kind: {name.replace('-', '_')}}}",
        ]
    )
