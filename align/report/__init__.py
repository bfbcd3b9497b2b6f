"""Report of a run folder as a single, self-contained HTML page: ``write_report(run_dir)``.

The page is made from the files of the run alone, at any moment of the run, and imports no torch.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from align.data.files import write_text
from align.report.changes import repeated
from align.report.facts import environment, facts, listing
from align.report.figures import sections
from align.report.images import gallery
from align.report.page import fill
from align.report.prompts import by_prompt
from align.report.reading import Run, read_run
from align.report.unit_cost import unit_cost
from align.report.using import snippet
from align.report.verdict import changes, judge
from align.report.verdict import headline as headline_of

__all__ = ["headline", "render", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    Raises:
        RunFolderError: the folder holds nothing of a run.
    """
    path = Path(run_dir) / "report.html"
    write_text(path, render(read_run(Path(run_dir))))
    return path


def headline(run_dir: Path) -> str:
    """The verdict on a run folder in one line."""
    return headline_of(read_run(Path(run_dir)))


def render(run: Run) -> str:
    """The page as text."""
    compared = changes(run)
    page: dict[str, Any] = {
        "run": run,
        "name": str(run.summary.get("name") or run.config.get("name") or run.folder.resolve().name),
        "verdict": judge(run),
        "changes": compared,
        "repeated": repeated(run),
        "by_prompt": by_prompt(run, next(iter(compared), None)),
        "facts": facts(run),
        "unit_cost": unit_cost(run, compared),
        "gallery": gallery(run),
        "sections": sections(run),
        "environment": environment(run),
        "listing": listing(run.folder),
        "snippet": snippet(run),
        "again": shlex.join(["alignflow", "train", "config.yaml", "--out", f"../{run.folder.resolve().name}-again"]),
    }
    return fill("report.html", what="run", **page)
