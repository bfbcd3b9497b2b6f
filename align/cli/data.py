"""``alignflow data``: a preview of training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.cli.shared import ConfigArgument, Overrides
from align.config.command_line import files_and_overrides
from alignflow.terminal import echo
from alignflow.words import count as counted

app = typer.Typer(name="data", help="Preview training data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Preview training data."""


@app.command(epilog="Example: alignflow data preview configs/shapes-edit/nft.yaml --out preview.html")
def preview(
    config: ConfigArgument,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="items of each source")] = 16,
    out: Annotated[Path, typer.Option(help="page to write")] = Path("preview.html"),
) -> None:
    """Write a page of the first training items: prompts, media as the model sees them, scores, rows left out."""
    from align.checking.check import seen_sizes
    from align.config.load import load_config

    files, overrides = files_and_overrides(config, overrides)
    settings = load_config(files, overrides)
    from align.data.preview import write

    for source in write(settings, out, count, seen_sizes(settings)):
        lost = f", {counted(len(source.dropped), 'row')} left out" if source.dropped else ""
        echo(f"{source.file}: {counted(len(source.items), 'item')}, {source.share:.0%} of a rollout{lost}")
    echo(out)
