"""``alignflow ui``: a local page that lists the runs below a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignflow.errors import ConfigError
from alignflow.extras import optional


def ui(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="folder of runs", show_default="runs")] = Path(
        "runs"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="port on 127.0.0.1; 0 = any free port")] = 8410,
) -> None:
    """List the runs below a folder on a local page that follows runs in training; it changes nothing."""
    for package in ("fastapi", "uvicorn"):
        optional(package, "alignflow ui", ConfigError)
    from align.ui.server import serve

    serve(folder, port, typer.echo)  # echo would hide the token in the address
