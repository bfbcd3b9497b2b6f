"""A run folder as one HTML page that needs nothing but itself: ``write_report(run_dir)``.

The page is made from the files of the run alone, at any moment of the run, and imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from align.files import write_text
from align.report.charts import draw, short, table
from align.report.facts import environment, facts, listing, lora_snippet
from align.report.figures import sections
from align.report.pictures import gallery
from align.report.reading import Run, read_run
from align.report.verdict import change, judge, trained_on_gold

__all__ = ["render", "write_report"]

_HERE = Path(__file__).parent


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
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.globals.update(draw=draw, table=table)
    templates.filters.update(short=short)
    roles = ("gold",) if trained_on_gold(run) else ("gold", "reward")
    page: dict[str, Any] = {
        "css": Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        "js": Markup((_HERE / "report.js").read_text(encoding="utf-8")),
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
    return templates.get_template("report.html").render(page)
