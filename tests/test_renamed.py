"""Old names of commands, options, settings and environment variables: each is an error with the new name."""

from __future__ import annotations

import os

import pytest
import written
from pydantic import ValidationError

from align.config import registry, roots
from alignflow import renamed
from alignflow.errors import ConfigError
from alignflow.explain import explain
from alignflow.strict import Strict

run = written.run


def settings_classes() -> list[type[Strict]]:
    """Every class of settings in the repository."""
    registry.summary()
    assert roots.roots()
    found, waiting = [], [Strict]
    while waiting:
        cls = waiting.pop()
        found.append(cls)
        waiting += cls.__subclasses__()
    return [cls for cls in found if cls.__module__.startswith(("align", "generators", "rewards"))]


OLD = [(cls, old, new) for cls in settings_classes() for old, new in vars(cls).get("renamed", {}).items()]


@pytest.mark.parametrize(("cls", "old", "new"), OLD, ids=lambda value: getattr(value, "__name__", value))
def test_an_old_setting_gives_the_new_name(cls, old, new):
    assert old not in cls.model_fields
    assert "." in new or new in cls.model_fields
    with pytest.raises(ValidationError) as caught:
        cls.model_validate({old: 1})
    problems = explain(caught.value, cls, {old: 1}, {})
    assert (old, f"is now {new}") in [(problem.path, problem.message) for problem in problems]


@pytest.mark.parametrize("old", renamed.COMMANDS, ids=" ".join)
def test_an_old_command_gives_the_new_one(old, run):
    code, out, err = run(*old, "a.yaml", "fit.lr=1")
    new = " ".join(renamed.COMMANDS[old])
    assert (code, out) == (2, "")
    assert f"alignflow {' '.join(old)} is now alignflow {new}: alignflow {new} a.yaml fit.lr=1" in err
    assert run(*renamed.COMMANDS[old], "--help")[0] == 0


@pytest.mark.parametrize("command", renamed.OPTIONS, ids=" ".join)
def test_an_old_option_gives_the_new_one(command, run):
    for old, new in renamed.OPTIONS[command].items():
        for words in ((old, "2"), (f"{old}=2",)):
            code, out, err = run(*command, *words)
            assert (code, out) == (2, "")
            assert f"the option {old} of alignflow {' '.join(command)} is now {new}" in err
        assert new.split()[0] in run(*command, "--help")[1]


@pytest.mark.parametrize("words", [("--set", "seed=3"), ("--set=seed=3",)])
@pytest.mark.parametrize("command", ["train", "evaluate", "search", "check", "sample"])
def test_the_old_option_for_overrides_gives_the_new_form(command, words, run):
    code, out, err = run(command, "run.yaml", *words)
    assert (code, out) == (2, "")
    assert "overrides are written without --set: seed=3" in err


@pytest.mark.parametrize("old", renamed.VARIABLES)
def test_an_old_environment_variable_gives_the_new_one(old, monkeypatch):
    new = renamed.VARIABLES[old]
    monkeypatch.setitem(os.environ, old, "1")
    with pytest.raises(ConfigError, match=f"{old} is now {new}"):
        renamed.variable(new)
