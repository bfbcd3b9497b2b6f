"""The page that lists runs: read-only, on this machine alone."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Response
from fastapi.responses import HTMLResponse

import align.report
from align.comparison import compare
from align.comparison.page import render as render_comparison
from align.report import render
from align.report.images import embed
from align.report.reading import read_run
from align.runs import owned
from align.runs.lock import in_use
from align.ui.guarded import INLINED, PROTECTION, protected, run
from align.ui.runs import Runs, unreadable
from alignflow.errors import RunFolderError
from alignflow.text import printable

PAGE = Path(__file__).with_name("page.html")
STYLE = Path(align.report.__file__).with_name("report.css")
SIDE = 256
"""Largest side of an image in the list."""
MOST = 32
"""Runs that are compared at most."""
AGAIN = 20
"""Seconds after which the report of a run in training is shown again."""


def create_app(folder: Path, token: str, port: int) -> FastAPI:
    """The application; it has no route that writes.

    Args:
        folder: whose runs are listed.
        token, port: as :func:`align.ui.guarded.protected` reads them.
    """
    app = protected(token, port, "alignflow ui")
    runs = Runs(folder)

    def folder_of(key: str) -> Path:
        found = runs.find(key)
        if found is None:
            raise HTTPException(404, f"there is no run {printable(key, 200)} below {runs.folder}; was it deleted?")
        return found

    @app.get("/")
    def page() -> HTMLResponse:
        style = STYLE.read_text(encoding="utf-8")
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("/*report.css*/", style), headers=PROTECTION)

    @app.get("/runs")
    def listed() -> dict[str, Any]:
        gone = not runs.folder.is_dir()
        problem = f"{runs.folder} was deleted" if gone else ""
        return {"folder": str(runs.folder), "problem": problem, "runs": [asdict(card) for card in runs.cards()]}

    @app.get("/report")
    def report(key: Annotated[str, Query(alias="run", max_length=4096)]) -> HTMLResponse:
        path = folder_of(key)
        again = {"Refresh": str(AGAIN)} if in_use(path) else {}
        return HTMLResponse(report_of(path), headers=INLINED | again)

    @app.get("/compare")
    def comparison(keys: Annotated[list[str], Query(alias="run", min_length=2, max_length=MOST)]) -> HTMLResponse:
        return HTMLResponse(compared([folder_of(key) for key in keys]), headers=INLINED)

    @app.get("/image")
    def image(key: Annotated[str, Query(alias="run", max_length=4096)], step: int, row: int) -> Response:
        image = embed(folder_of(key) / "samples" / f"step-{step:06d}" / f"{row:03d}.png", SIDE)
        if image is None:
            raise HTTPException(404, f"there is no sample {row} of step {step}")
        kind, _, content = image.uri.removeprefix("data:").partition(";base64,")
        return Response(base64.b64decode(content), media_type=kind, headers=PROTECTION)

    return app


def compared(folders: list[Path]) -> str:
    """The page that compares runs.

    Raises:
        RunFolderError: nothing in them can be compared, or one of them is damaged.
    """
    try:
        return render_comparison(compare(folders))
    except RunFolderError:
        raise
    except Exception as error:  # files of any kind of damage, written by any program
        raise RunFolderError(f"these runs cannot be compared: {unreadable(error)}") from error


def report_of(path: Path) -> str:
    """The report of a run as it is now; of a search and other kinds, the page that they wrote.

    Raises:
        RunFolderError: there is none yet, or the run is gone.
    """
    kind = owned.read_mark(path).get("kind") or owned.TRAINING
    try:
        if kind == owned.TRAINING:
            return render(read_run(path))
        return (path / "report.html").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunFolderError(f"{path} has no report yet") from None
    except Exception as error:  # files of any kind of damage, written by any program
        raise RunFolderError(f"{path} cannot be shown: {unreadable(error)}") from error


def serve(folder: Path, port: int, say: Callable[[str], None] = print) -> None:
    """Serve the page until interrupted.

    Args:
        port: 0 = any free one.

    Raises:
        RunFolderError: there is no such folder.
        ConfigError: the port is taken.
    """
    if not folder.is_dir():
        raise RunFolderError(f"no folder {folder} (looked in {Path.cwd()}); name the folder that holds your runs")
    count = len(Runs(folder).cards())
    told = f"{count} runs below {printable(str(folder))}." if count else f"no runs below {printable(str(folder))} yet."
    run(lambda token, chosen: create_app(folder, token, chosen), port, told, say)
