"""Cost of a light command before it does anything: CPU time relative to a bare import of its libraries.

    python -m benchmarks.start

Each is the best of ``--repeat`` fresh interpreters, all taking turns, so a busy machine stretches both alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

BARE = "import pydantic, ruamel.yaml, typer.main, numpy"
COMMAND = "from align.cli.app import main\ntry:\n    main({!r})\nexcept SystemExit:\n    pass"
MEASURE = "import resource as r\nused = r.getrusage(r.RUSAGE_SELF)\nprint('\\ncpu', used.ru_utime + used.ru_stime)"
BODIES = {
    "its libraries alone": BARE,
    "--help": COMMAND.format(["--help"]),
    "recipes": COMMAND.format(["recipes"]),
    "env": COMMAND.format(["env"]),
    "check": COMMAND.format(["check", "configs/quickstart.yaml"]),
}


def cpu(body: str) -> float:
    """User and system seconds of a fresh interpreter that runs ``body``."""
    done = subprocess.run([sys.executable, "-c", f"{body}\n{MEASURE}"], capture_output=True, text=True, check=True)
    return float(done.stdout.rsplit("cpu", 1)[1])


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    turns = [{name: cpu(body) for name, body in BODIES.items()} for _ in range(repeat)]
    best = {name: min(turn[name] for turn in turns) for name in BODIES}
    bare = best["its libraries alone"]
    for name, seconds in best.items():
        print(f"{name:22} {seconds:.3f} s  x {seconds / bare:.2f}")


if __name__ == "__main__":
    main()
