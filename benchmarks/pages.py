"""Writes the pages of docs/ that follow from the code: ``python -m benchmarks.pages``.

``docs/catalogue.md`` lists every generator, recipe, reward, sampler and search method; ``docs/rooms.md`` lists every
module with the first line of its docstring. ``docs/reference/`` has every setting, command and public function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from align.config.registry import reward_columns, summary
from benchmarks.helpers import python_reference, reference

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("alignflow", "generators", "rewards", "align")
TITLES = {
    "recipes": ("Recipes", "`recipe: {kind: ...}` in a training config"),
    "generators": ("Generators", "`generator: {kind: ..., path: ...}`"),
    "rewards": ("Rewards", "`reward: {kind: ...}`; [formulas, weights and checks](rewards.md)"),
    "samplers": ("Samplers", "`sampler: {kind: ...}`"),
    "search": ("Search methods", "`search: {kind: ...}` in a search config; [results](search.md)"),
}

NOTES = {
    "rewards": [
        "*Gradient* shows whether gradients flow from the scores to the media, *scope* which samples must be scored",
        "together. Both are those of the default settings: a judge behind an endpoint and `backend: package` have no",
        "gradient, for example. *depends* = on the rewards inside, or on the server.",
        "",
    ]
}


def catalogue() -> str:
    """The text of ``docs/catalogue.md``."""
    found, columns = summary(), {"rewards": reward_columns()}
    lines = ["# Catalogue", "", f"{reference.WRITTEN} `alignflow recipes`, or `alignflow list`, prints the same list."]
    for name, (title, use) in TITLES.items():
        lines += ["", f"## {title}", "", f"{len(found[name])} kinds: {use}.", "", *NOTES.get(name, [])]
        more = columns.get(name, {})
        lines += ["| kind | gradient | scope | |", "|---|---|---|---|"] if more else ["| kind | |", "|---|---|"]
        for kind, line in found[name].items():
            lines.append(f"| {' | '.join([f'`{kind}`', *more.get(kind, ()), _cell(line)])} |")
    return "\n".join(lines) + "\n"


def rooms() -> str:
    """The text of ``docs/rooms.md``."""
    lines = ["# Modules", "", "Written by `python -m benchmarks.pages` from the first lines of the docstrings."]
    for package in PACKAGES:
        for folder in sorted({file.parent for file in (ROOT / package).rglob("*.py")}):
            lines += ["", f"## `{folder.relative_to(ROOT)}/`", "", *_modules(folder)]
    return "\n".join(lines) + "\n"


def _modules(folder: Path) -> Iterator[str]:
    yield _first_line(folder / "__init__.py")
    files = [file for file in sorted(folder.glob("*.py")) if file.name not in ("__init__.py", "__main__.py")]
    if files:
        yield from ("", "| module | |", "|---|---|")
        yield from (f"| `{file.name}` | {_cell(_first_line(file))} |" for file in files)


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ").replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {
    "catalogue.md": catalogue,
    "rooms.md": rooms,
    "reference/training.md": reference.training,
    "reference/recipes.md": reference.recipes,
    "reference/rewards.md": reference.rewards,
    "reference/search.md": reference.search,
    "reference/other.md": reference.others,
    "reference/commands.md": reference.commands,
    "reference/python.md": python_reference.page,
}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
