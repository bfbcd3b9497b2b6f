"""Question read from a file published by its authors, which is not part of this project and not executed. No torch."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignflow.paths import expanded
from rewards.base import RewardError

PLACE = "{text_prompt}"


def read_template(file: Path, names: Sequence[str], order: Sequence[str], where: str) -> str:
    """The question of a text file, or of the authors' Python file, which is parsed.

    Args:
        names: constants of the Python file that hold it, one after the other.
        order: what the question must hold, each once and in this order; :data:`PLACE` stands for the prompt.
        where: it is found.

    Raises:
        RewardError: no such file, no such constants, or another order.
    """
    text = _text(file, where)
    if file.suffix == ".py":
        text = "".join(_constant(text, name, file, str) for name in names)
    places = [text.find(mark) for mark in order]
    if -1 in places or places != sorted(places) or any(text.count(mark) != 1 for mark in order):
        raise RewardError(f"template {file} should hold each of {' '.join(order)} once, in this order")
    return text


def read_dictionary(file: Path, name: str, where: str) -> dict[str, Any]:
    """The dictionary ``name`` of the authors' Python file, which is parsed, or the whole of a JSON file.

    Raises:
        RewardError: no such file, or no such dictionary in it.
    """
    text = _text(file, where)
    if file.suffix == ".py":
        return _constant(text, name, file, dict)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RewardError(f"template {file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RewardError(f"template {file} holds {type(found).__name__}, not a dictionary")
    return found


def _text(file: Path, where: str) -> str:
    try:
        return expanded(file, RewardError).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"template {file} cannot be read ({error}); it is in {where}") from None


def _constant(source: str, name: str, file: Path, kind: type) -> Any:
    try:
        statements: Sequence[ast.stmt] = ast.parse(source).body
    except SyntaxError as error:
        raise RewardError(f"template {file} is not Python: {error}") from None
    for statement in statements:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in statement.targets
        ):
            try:
                value = ast.literal_eval(statement.value)
            except ValueError:  # made by code
                continue
            if isinstance(value, kind):
                return value
    raise RewardError(f"template {file} does not define {name}")
