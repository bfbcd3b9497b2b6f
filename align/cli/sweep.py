"""``alignflow sweep``: several values of some settings, a run for every combination, and a comparison of all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.cli.pages import show


def sweep(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML config, or several with commas between", show_default=False)
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MORE.yaml|KEY=VALUE,VALUE",
            help="configs merged over the first, then overrides; commas separate alternatives: train.lr=1e-4,3e-4",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the sweep; default: runs/<name>-sweep")] = None,
    processes: Annotated[int, typer.Option(min=1, max=1024, help="processes of each run, one per GPU")] = 1,
    launcher: Annotated[
        str, typer.Option(metavar="WORDS", help="another launcher: 'torchrun --nproc_per_node 8 -m align'")
    ] = "",
    slurm: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write a Slurm array script instead of running; submits nothing")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a sweep; finished runs are not repeated")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and list the runs, and write nothing")] = False,
) -> None:
    """Run a config with every combination of several values, one run after another, and compare the runs."""
    from align.sweeps.command import sweep as run
    from align.sweeps.running import Launcher

    starter = Launcher(processes, launcher)
    code = run(
        [config, *(words or [])], out, starter, lambda folder, page: show([folder], page),
        script=slurm, resume=resume, dry_run=dry_run,
    )  # fmt: skip
    if code:
        raise typer.Exit(code)
