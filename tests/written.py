"""What tests of settings and commands share: configs in a working directory of their own, commands in process."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.cli import app as cli
from align.config.load import load_config
from alignflow.errors import ConfigError

BASE = """\
generator: {path: some/folder}
prompts: {train: shapes:train, heldout: shapes:heldout}
rollout: {kind: pairs, file: pairs.jsonl}
recipe:
  kind: nft
  beta: 0.5
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the working directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def writer(text: str = BASE, name: str = "run.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return writer


def refused(path, overrides=()) -> str:
    """The message of the ConfigError that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.fixture
def run(capsys):
    """Run the command in this process -> (exit code, stdout, stderr)."""

    def runner(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return runner
