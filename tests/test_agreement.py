"""Processes that would train different things are told so before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from launched import launch
from tiny_run import settings

from align.training import agreement

DIFFERS = """
import os, sys
from pathlib import Path
from align.training import trainer
from alignflow.errors import TrainingError
from tiny_run import settings
folder, model, rank = Path(sys.argv[1]), Path(sys.argv[2]), os.environ["RANK"]
trainer.build_generator = None  # nothing may be loaded
try:
    trainer.train(settings(folder, model, train={"lr": 1e-2 if rank == "0" else 2e-2}))
except TrainingError as error:
    (folder / rank).write_text(str(error))
"""


@pytest.mark.slow
def test_processes_with_other_settings_stop_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    launch(2, tmp_path, DIFFERS, str(tmp_path), str(model))
    said = [(tmp_path / rank).read_text() for rank in "01"]
    assert said[0] == said[1]
    assert said[0].startswith("process 1 on ")
    assert "train.lr is 0.02, not 0.01; start all processes with the same files" in said[0]
    assert not (tmp_path / "run").exists()


def test_differences_are_named(model: Path, tmp_path: Path) -> None:
    main = agreement.stated(settings(tmp_path, model))
    assert agreement.difference(main, main) == ""
    other = replace(main, packages={**main.packages, "torch": "2.0"}, code="another")
    said = agreement.difference(main, other)
    assert said == f"torch 2.0, not {main.packages['torch']}; the source files of alignflow"
    far = agreement.stated(settings(tmp_path, model, "grpo", train={"lr": 1.0, "steps": 9}))
    assert agreement.difference(main, far).endswith("more")


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    digests = []
    for name, text in (("a.py", "1"), ("b.py", "1"), ("b.py", "2")):
        folder = tmp_path / str(len(digests)) / "align"
        folder.mkdir(parents=True)
        (folder / name).write_text(text)
        digests.append(agreement.code_digest(folder.parent))
    assert len({*digests}) == 3
    (tmp_path / "2" / "align" / "notes.txt").write_text("not code")
    assert agreement.code_digest(tmp_path / "2") == digests[2]
