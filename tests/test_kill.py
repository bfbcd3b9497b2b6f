"""A command that is killed before any of its file operations goes on, or starts anew, to the same folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "options",
    [
        "--jobs reward --real 1 --random 1 --processes 1",
        pytest.param("--jobs train overwrite --real 2 --random 4 --processes 1", marks=pytest.mark.slow),
        pytest.param("--jobs search export --real 2 --random 4 --processes 1", marks=pytest.mark.slow),
        pytest.param("--jobs train --real 1 --random 2 --processes 2", marks=pytest.mark.slow),
    ],
)
def test_what_was_killed_ends_in_the_same_folder(options: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.kill", *options.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert rows
    assert all(int(states) > 9 and int(kills) >= 1 and failed == "0" for _, _, _, states, kills, failed, _ in rows)
