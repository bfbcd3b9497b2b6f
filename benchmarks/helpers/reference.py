"""Reference pages for :mod:`benchmarks.pages`: settings from the pydantic classes, commands from the command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.cli.app import app
from align.config import registry
from align.config.describe import choice_of, default_of, models_of, one_line, plain, type_of
from align.config.settings import Config
from align.preference.settings import JudgeTrainConfig, LatentTrainConfig, RewardTrainConfig
from align.reasoning.settings import ReasonConfig
from align.recipes.base import Recipe
from align.rewriting.joint_settings import JointConfig
from align.rewriting.settings import EvolveConfig, RewriterConfig
from align.search.base import Method
from align.search.settings import SearchConfig
from rewards.base import RewardSettings

WRITTEN = "Written by `python -m benchmarks.pages`."
HOW = (
    "A setting is written `section: {name: value}` in a config, or `section.name=value` after a command.\n"
    "*Required* settings have no default."
)
NESTED: dict[Any, str] = {list: "[].", dict: ".NAME."}
LINKS = {"reward": "rewards.md", "recipe": "recipes.md", "search": "search.md"}
OTHERS: dict[str, type[BaseModel]] = {
    "Training a reward": RewardTrainConfig,
    "Training a latent reward": LatentTrainConfig,
    "Training a judge": JudgeTrainConfig,
    "Training a judge that reasons": ReasonConfig,
    "Evolving prompts": EvolveConfig,
    "Training a rewriter": RewriterConfig,
    "Training a rewriter and a generator": JointConfig,
}


def training() -> str:
    """The text of ``docs/reference/training.md``."""
    lines = [
        "# Settings of a training run",
        "",
        WRITTEN,
        HOW,
        "",
        "For `alignflow train`, `check`, `sample` and `evaluate`.",
    ]
    return _text([*lines, *_tree(Config, "", 2)])


def recipes() -> str:
    """The text of ``docs/reference/recipes.md``."""
    lines = ["# Settings of recipes", "", f"{WRITTEN} `recipe: {{kind: nft, ...}}`. {HOW}"]
    lines += ["", "Every recipe has:", "", *_table(Recipe, skip=("kind",))]
    return _text([*lines, *_kinds(registry.recipes(), Recipe)])


def rewards() -> str:
    """The text of ``docs/reference/rewards.md``."""
    lines = ["# Settings of rewards", "", f"{WRITTEN} `reward: {{kind: clip, ...}}`. {HOW}"]
    return _text([*lines, *_kinds(registry.rewards(), RewardSettings)])


def search() -> str:
    """The text of ``docs/reference/search.md``."""
    lines = ["# Settings of a search", "", WRITTEN, HOW, "", "For `alignflow search`."]
    lines += [*_tree(SearchConfig, "", 2), "", "## Methods", "", "Every method has:", ""]
    lines += _table(Method, skip=("kind",))
    return _text([*lines, *_kinds(registry.searches(), Method)])


def others() -> str:
    """The text of ``docs/reference/other.md``: the configs of the remaining commands."""
    lines = ["# Settings of other commands", "", WRITTEN, HOW]
    for title, cls in OTHERS.items():
        command = getattr(cls, "command", "")
        lines += ["", f"## {title}", "", f"For `alignflow {command}`. {_first(cls)}", *_tree(cls, "", 3)]
    return _text(lines)


def commands() -> str:
    """The text of ``docs/reference/commands.md``."""
    lines = ["# Commands", "", f"{WRITTEN} `alignflow COMMAND --help` prints the same."]
    for name, info in _registered(app):
        lines += [] if info.hidden else _command(name, info)
    return _text(lines)


# -- settings ---------------------------------------------------------------------------------------------------------


def _kinds(kinds: Mapping[str, type[BaseModel]], base: type[BaseModel]) -> Iterator[str]:
    for kind, cls in kinds.items():
        yield from ("", f"### {kind}", "", _first(cls).rstrip(".") + ".")
        if set(cls.model_fields) - set(base.model_fields) - {"kind"}:
            yield from ("", *_table(cls, skip=("kind", *base.model_fields)))
        else:
            yield from ("", "No settings of its own.")


def _tree(cls: type[BaseModel], path: str, level: int) -> Iterator[str]:
    """A table of ``cls``, and below it one for every section."""
    fields = {name: field for name, field in cls.model_fields.items() if name != "kind" or path}
    sections = {name: field for name, field in fields.items() if _is_section(field)}
    yield from ("", *_table(cls, skip=[name for name in cls.model_fields if name not in fields or name in sections]))
    for name, field in sections.items():
        where = f"{path}.{name}" if path else name
        yield from ("", f"{'#' * level} {where}", "", _sentence(field.description or ""))
        choice = choice_of(field)
        if choice is None:
            yield from _tree(models_of(field.annotation)[0], where, min(level + 1, 5))
        elif choice.what in LINKS:
            yield from ("", f"[Kinds and their settings]({LINKS[choice.what]})")
        else:
            for kind, one in choice.choices().items():
                also = " (default)" if kind == choice.default else ""
                yield from ("", f"`kind: {kind}`{also}: {_first(one)}", "", *_table(one, skip=("kind",)))


def _table(cls: type[BaseModel], skip: Any = ()) -> Iterator[str]:
    rows = list(_rows(cls, "", skip))
    yield from ("| setting | value | default | meaning |", "|---|---|---|---|", *rows) if rows else ()


def _rows(cls: type[BaseModel], path: str, skip: Any = ()) -> Iterator[str]:
    """A row for every setting; those of a nested mapping follow it with dotted names."""
    for name, field in cls.model_fields.items():
        if name in skip:
            continue
        said = choice_of(field)
        linked = said is not None and said.what in LINKS
        value = f"[{said.what}]({LINKS[said.what]})" if said and linked else type_of(field.annotation, field.metadata)
        cells = [f"`{path}{name}`", value, default_of(field), field.description or ""]
        yield f"| {' | '.join(map(_cell, cells))} |"
        nested = [] if said else [one for one in models_of(field.annotation) if not issubclass(one, RewardSettings)]
        if len(nested) == 1 and path.count(".") < 2:
            inner = NESTED.get(get_origin(field.annotation), ".")
            yield from _rows(nested[0], f"{path}{name}{inner}")


def _is_section(field: FieldInfo) -> bool:
    """Whether a field is its own section rather than a row of a table."""
    return choice_of(field) is not None or (
        len(models_of(field.annotation)) == 1 and get_origin(field.annotation) is None
    )


# -- commands ---------------------------------------------------------------------------------------------------------


def _registered(of: typer.Typer) -> Iterator[tuple[str, typer.models.CommandInfo]]:
    """(name, command) of an app and its groups, sorted."""
    found = [(str(info.name or getattr(info.callback, "__name__", "")), info) for info in of.registered_commands]
    for group in of.registered_groups:
        assert group.typer_instance is not None
        prefix = group.name or group.typer_instance.info.name
        found += [(f"{prefix} {name}", info) for name, info in _registered(group.typer_instance)]
    return iter(sorted(found, key=lambda pair: pair[0]))


def _command(name: str, info: typer.models.CommandInfo) -> Iterator[str]:
    assert info.callback is not None
    text = info.help or inspect.getdoc(info.callback) or ""
    yield from ("", f"## alignflow {name}", "", one_line(text), "")
    if info.epilog:
        yield from ("```sh", info.epilog.strip().removeprefix("Example: "), "```", "")
    signature = inspect.signature(info.callback, eval_str=True)
    rows = [_parameter(one) for one in signature.parameters.values() if get_origin(one.annotation) is Annotated]
    yield from ("| argument or option | value | default | meaning |", "|---|---|---|---|", *rows) if rows else ()


def _parameter(one: inspect.Parameter) -> str:
    kind, mark = get_args(one.annotation)[:2]
    declared = [part for part in (mark.default, *(mark.param_decls or ())) if str(part).startswith("-")]
    if isinstance(mark, typer.models.OptionInfo):
        name = ", ".join(f"`{part}`" for part in declared or [f"--{one.name.replace('_', '-')}"])
        value = "" if kind is bool else mark.metavar or type_of(kind, [mark]).removesuffix(" or null")
    else:
        name, value = f"`{mark.metavar or one.name.upper()}`", type_of(kind, [mark]).removesuffix(" or null")
    required = one.default is inspect.Parameter.empty
    default = "*required*" if required else "" if not one.default else f"`{plain(one.default)}`"
    return f"| {' | '.join(map(_cell, [name, value, default, mark.help or '']))} |"


# -- text -------------------------------------------------------------------------------------------------------------


def _first(cls: type[BaseModel]) -> str:
    return one_line((cls.__doc__ or "").strip().partition("\n\n")[0])


def _sentence(text: str) -> str:
    text = one_line(text)
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."


def _cell(text: str) -> str:
    """Text of a cell: one line, bars escaped, angle brackets outside code escaped."""
    text = one_line(text).replace("|", "\\|")
    return "".join(part if n % 2 else part.replace("<", "&lt;") for n, part in enumerate(re.split(r"(`[^`]*`)", text)))


def _text(lines: list[str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"
