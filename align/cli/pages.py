"""Commands that write a page of runs: ``alignflow report`` of one run, ``alignflow compare`` of several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from align.cli.shared import AsJson, runs_completed
from alignflow.errors import RunFolderError
from alignflow.terminal import echo, table


def report(
    run_dir: Annotated[Path, typer.Argument(help="run folder", show_default=False, autocompletion=runs_completed)],
) -> None:
    """Write the report of a run folder, a single HTML page."""
    from align.report import write_report
    from align.report.search import write_search_report

    if not run_dir.is_dir():
        raise RunFolderError(f"no run folder {run_dir} (looked in {Path.cwd()})")
    echo(write_search_report(run_dir) if (run_dir / "candidates").is_dir() else write_report(run_dir))


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN ...",
            help="folders of runs, searches, benchmarks or sweeps",
            show_default=False,
            autocompletion=runs_completed,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="page; default: compare.html here, or in the folder of a single sweep")
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="show every run by itself, not grouped over seeds")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs on the same held-out prompts: tables in the terminal, and a single HTML page."""
    show(runs, out or (runs[0] / PAGE if len(runs) == 1 else Path(PAGE)), each, as_json)


PAGE = "compare.html"


def show(folders: Sequence[Path], out: Path, each: bool = False, as_json: bool = False) -> None:
    """Compare the runs in some folders: print the tables, or JSON, and write the page."""
    from align.comparison import compare as of
    from align.comparison import write_page

    found = of(folders, each)
    page = write_page(found, out)
    if as_json:
        echo(json.dumps(found.numbers(), indent=2))
        return
    for head, rows in found.lines():
        echo(f"{table(head, rows)}\n")
    _, sentence, detail = found.verdict()
    echo(f"{sentence} {detail}".rstrip())
    for title, text in found.notes:
        echo(f"note: {title}: {text}", err=True)
    echo(f"comparison: {page}")
