"""Optional packages: the versions named in messages are those that were tested, and the messages install them."""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignflow.errors import DataError
from alignflow.extras import EXTRAS, optional, remedy

ROOT = Path(__file__).parent.parent
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def test_pins_in_messages_are_those_of_the_constraints():
    exact = {module: text.split("==")[1] for module, (_, text) in EXTRAS.items() if "==" in text}
    assert exact == {module: PINS[module] for module in exact}
    assert {"ray", "datasets", "fastapi", "uvicorn"} <= exact.keys()


def test_every_extra_is_one_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    for module, (extra, _) in EXTRAS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{extra} = "))
        assert module in line, module


def test_the_readme_installs_what_was_tested_together():
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if "pip install -q -" in line]
    assert len(commands) == 2
    assert all("-c constraints.txt" in line for line in commands)
    assert PINS["torch"] == "2.13.0"


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "no_such_package_here", None)
    with pytest.raises(DataError, match=r"reward 'pool' needs the package ray, which .*: pip install 'ray==[\d.]+'"):
        optional("ray", "reward 'pool'", DataError)
    assert remedy("no_such_package_here") == "pip install 'no_such_package_here'"


def test_a_package_that_fails_to_import_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "broken_here.py").write_text("raise ImportError('needs peft>=0.22.0')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"which does not import \(needs peft>=0\.22\.0\)"):
        optional("broken_here", "the judge", DataError)


CORE = {
    "PIL", "accelerate", "diffusers", "ftfy", "huggingface_hub", "imageio", "imageio_ffmpeg", "jinja2", "markupsafe",
    "numpy", "packaging", "peft", "pydantic", "pydantic_core", "requests", "ruamel", "safetensors", "scipy",
    "tokenizers", "torch", "transformers", "typer", "urllib3",
}  # fmt: skip
"""Modules of pyproject's dependencies and of what those require."""
ASKED_FOR = {"align/labelling/server.py", "align/ui/guarded.py", "align/ui/server.py", "rewards/serving/server.py",
             "rewards/serving/doors.py", "rewards/serving/intake.py"}  # fmt: skip
"""Files that import fastapi or uvicorn at the top: their commands call ``optional`` before they import them."""


def test_every_optional_import_has_a_message():
    """A module outside the dependencies is imported where ImportError or find_spec leads to a message."""
    found = {}
    for package in ("alignflow", "generators", "rewards", "align"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for module in {name.split(".")[0] for name in imported(text)} - CORE - sys.stdlib_module_names:
                if module not in ("alignflow", "generators", "rewards", "align"):
                    found.setdefault(file.relative_to(ROOT).as_posix(), set()).add(module)
    bare = {
        name: modules
        for name, modules in found.items()
        if name not in ASKED_FOR
        and not any(word in (ROOT / name).read_text() for word in ("except ImportError", "find_spec", "optional("))
    }
    assert bare == {"align/training/tracking.py": {"tensorboard"}}  # checked before a run as a tracker
    unknown = set.union(*found.values()) - EXTRAS.keys()
    assert unknown <= {"av", "hpsv2", "ImageReward", "starlette"}  # each with a message of its own, or with fastapi


def imported(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def test_an_installed_package_is_returned(monkeypatch):
    made = types.ModuleType("made_here")
    monkeypatch.setitem(sys.modules, "made_here", made)
    assert optional("made_here", "a test", DataError) is made
