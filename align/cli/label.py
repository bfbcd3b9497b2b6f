"""``alignflow label``: a local page on which a person compares samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignflow.errors import ConfigError
from alignflow.extras import optional
from alignflow.terminal import echo


def label(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="table with prompt, chosen, rejected or with prompt, sample; or a folder of alignflow sample",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="table of votes (.jsonl); an existing one is continued")] = Path(
        "votes.jsonl"
    ),
    user: Annotated[str, typer.Option(help="name written into every vote, for rewards with a part per user")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port on 127.0.0.1; 0 = any free port")] = 8400,
    seed: Annotated[int, typer.Option(min=0, help="random seed of the side on which a sample is shown")] = 0,
) -> None:
    """Compare samples on a local page, with the keyboard; the votes train a reward or a Flow-DPO run."""
    for package in ("fastapi", "uvicorn"):
        optional(package, "alignflow label", ConfigError)
    from align.labelling.server import serve
    from align.labelling.votes import Votes, read_candidates

    pairs = read_candidates(source, seed)
    with Votes(out, user, echo) as votes:
        serve(pairs, votes, port, typer.echo)  # echo would hide the token in the address
