"""``alignflow doctor``: whether this machine can train, and what to do if it cannot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.cli.shared import AsJson
from alignflow.lazy import lazy
from alignflow.terminal import echo
from alignflow.words import count

if TYPE_CHECKING:
    from align.doctor import examine
else:
    examine = lazy("align.doctor:examine")


def doctor(
    folder: Annotated[Path, typer.Option(help="folder that runs are written to")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Examine this machine, with advice; the exit code is 1 if something blocks training here."""
    found = []
    for one in examine(folder):
        found.append(one)
        if not as_json:
            echo(f"{one.state:7} {one.name:20} {one.found}")
            if one.advice:
                echo(f"{'':28} -> {one.advice}")
    blocking = [one.name for one in found if one.state == "blocks"]
    if as_json:
        echo(json.dumps({"ready": not blocking, "blocks": blocking, "findings": list(map(asdict, found))}, indent=2))
    elif blocking:
        echo(f"{count(len(blocking), 'finding')} blocks training here: {', '.join(blocking)}")
    else:
        echo("nothing blocks training on this machine")
    if blocking:
        raise typer.Exit(1)
