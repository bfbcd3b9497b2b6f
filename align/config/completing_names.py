"""Completion of names on a command line: run folders, their checkpoints, policies of pairs, formats. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

DEPTH = 2
"""Levels of folders below a word in which runs are found: ``runs`` and what a sweep makes inside."""
MOST = 200
"""Folders that are looked into at most."""
POLICIES = (
    "best_worst", "all", "rank_then_sift", "agree", "threshold_gap", "dominance", "pass_fail", "best_of_n_reference",
)  # fmt: skip
"""Policies of :mod:`align.preference.pairing`, which imports torch."""
FORMATS = ("diffusers", "comfyui", "kohya", "merged")
"""Formats of :mod:`align.export`, which imports torch."""


def named(names: tuple[str, ...], start: str) -> list[str]:
    """The names that begin with ``start``."""
    return [name for name in names if name.startswith(start)]


def runs(start: str) -> list[str]:
    """Run folders whose path begins with ``start``: those with a ``config.yaml``, :data:`DEPTH` levels down.

    Empty where there is none, so that the shell completes files by itself.
    """
    return sorted({str(folder) for folder in _below(start) if (folder / "config.yaml").is_file()})


def sources(start: str) -> list[str]:
    """Run folders as :func:`runs` finds them, and YAML files whose path begins with ``start``."""
    found = runs(start)
    try:
        files = [str(path) for path in _beginning(start) if path.suffix in (".yaml", ".yml") and path.is_file()]
    except OSError:
        files = []
    return [*found, *sorted(files)] if found else []


def checkpoints(run: Path | None, start: str) -> list[tuple[str, str]]:
    """``best`` and the steps of a run's checkpoints that begin with ``start``."""
    found = [("best", "the best by checkpoint.best")]
    if run is not None:
        try:
            steps = sorted((run / "checkpoints").glob("step-*"), reverse=True)
        except OSError:
            steps = []
        numbers = [path.name.removeprefix("step-") for path in steps]
        found += [(str(int(number)), "step") for number in numbers if number.isdecimal()]
    return [one for one in found if one[0].startswith(start)]


def _below(start: str) -> Iterator[Path]:
    """Folders whose path begins with ``start``, and those inside them."""
    level, seen = _folders(_beginning(start)), 0
    for _ in range(DEPTH):
        inside: list[Path] = []
        for folder in level:
            seen += 1
            if seen > MOST:
                return
            yield folder
            if not (folder / "config.yaml").is_file():
                inside += _folders(_inside(folder))
        level = inside


def _beginning(start: str) -> list[Path]:
    """Entries of a folder whose path begins with ``start``."""
    parent, name = (Path(start), "") if start.endswith("/") else (Path(start).parent, Path(start).name)
    return [path for path in _inside(parent) if path.name.startswith(name)]


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _folders(paths: list[Path]) -> list[Path]:
    return [path for path in paths if not path.name.startswith(".") and path.is_dir()]
