"""Python code on several real processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def launch(count: int, folder: Path, code: str, *args: str, timeout: float = 240) -> str:
    """Run ``code`` on ``count`` gloo processes of one thread each; returns what they print. Fails as they do.

    The launcher of accelerate starts a single process where there is no GPU.
    """
    script = folder / "launched.py"
    script.write_text(
        f"from accelerate import PartialState\nassert PartialState(cpu=True).num_processes == {count}\n{code}"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), *args], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
