"""Optional packages: the versions named in messages are those that were tested, and the messages install them."""

from __future__ import annotations

import sys
import types
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


def test_an_installed_package_is_returned(monkeypatch):
    made = types.ModuleType("made_here")
    monkeypatch.setitem(sys.modules, "made_here", made)
    assert optional("made_here", "a test", DataError) is made
