"""A run folder as one HTML page that needs nothing but itself: ``write_report(run_dir)``.

The page is made from the files of the run alone, at any moment of the run, and imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.files import write_text
from align.report.facts import environment, facts, listing, lora_snippet
from align.report.figures import sections
from align.report.page import fill
from align.report.pictures import gallery
from align.report.reading import Run, read_run
from align.report.verdict import change, judge, trained_on_gold

__all__ = ["render", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    Raises:
        RunFolderError: the folder holds nothing of a run.
    """
    path = Path(run_dir) / "report.html"
    write_text(path, render(read_run(Path(run_dir))))
    return path


def render(run: Run) -> str:
    """The page as text."""
    roles = ("gold",) if trained_on_gold(run) else ("gold", "reward")
    page: dict[str, Any] = {
        "run": run,
        "name": str(run.summary.get("name") or run.config.get("name") or run.folder.resolve().name),
        "verdict": judge(run),
        "changes": [found for role in roles if (found := change(run, role))],
        "facts": facts(run),
        "gallery": gallery(run),
        "sections": sections(run),
        "environment": environment(run),
        "listing": listing(run.folder),
        "snippet": lora_snippet(run),
    }
    return fill("report.html", what="run", **page)
