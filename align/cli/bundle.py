"""``alignflow bundle`` and ``alignflow repeat``: a training run in one file, repeated on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.cli.shared import Overrides, Resume, print_values, runs_completed
from alignflow.terminal import echo


def bundle(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="folder of a finished training run", show_default=False, autocompletion=runs_completed
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="FILE.tar", help="file to write", show_default=False)],
    limit: Annotated[
        float, typer.Option(min=0, help="maximum size in MB of a model, a LoRA or a table's media to pack")
    ] = 100,
) -> None:
    """Pack a training run with all files that it read into one file."""
    from align.bundles import pack

    manifest = pack.pack(run, out, int(limit * 1e6))
    for line in pack.said(manifest):
        echo(line, err=True)
    echo(f"{len(manifest['files'])} files in {out}; repeat the run with: alignflow repeat {out.name}")


def repeat(
    source: Annotated[
        Path, typer.Argument(metavar="FILE.tar", help="bundle, or the folder of an unpacked one", show_default=False)
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="new folder for the bundle and its run; default: the bundle's name")
    ] = None,
    run_code: Annotated[bool, typer.Option("--import", help="run the Python files that the bundle brings")] = False,
    unpack: Annotated[bool, typer.Option("--unpack", help="unpack only; train with FOLDER/run.yaml")] = False,
    resume: Resume = False,
) -> None:
    """Repeat the training run of a bundle and compare the weights with those of the first run."""
    from align.bundles import repeat as bundles

    found = bundles.opened(source, out)
    if not source.is_dir():
        echo(f"unpacked into {found.folder}", err=True)
    if unpack:
        return
    config = bundles.config_of(found, overrides or (), code=run_code)
    for line in bundles.differences(found, config):
        echo(f"warning: {line}", err=True)
    summary = bundles.repeat(found, config, resume=resume)
    equal = summary.pop("equal")
    print_values({**summary, "folder": str(config.run_dir)})
    echo("the weights are those of the first run, bit for bit" if equal else "the weights differ from the first run's")
