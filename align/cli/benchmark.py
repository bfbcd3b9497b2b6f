"""``alignflow benchmark``: a published prompt set, sampled and scored by category."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.cli.shared import SourceArgument, settings_of, trained_of
from alignflow.errors import ConfigError
from alignflow.terminal import echo
from alignflow.words import listing

FORMATS = (
    "geneval, t2i-compbench, dpg-bench, tiif, tiif-long, t2i-reasonbench, densealignbench, imgedit, gedit, gedit-cn, "
    "dreambench, table"
)


def benchmark(
    source: SourceArgument,
    kind: Annotated[str, typer.Argument(metavar="FORMAT", help=FORMATS, show_default=False)],
    prompts: Annotated[
        str, typer.Argument(metavar="SET", help="file or folder that the set's authors distribute", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="overrides, such as evaluate.rewards.vqa.kind=yes_probability"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for samples and results; an interrupted one is continued")] = Path(
        "benchmark"
    ),
    media: Annotated[Path | None, typer.Option(help="folder of the set's images")] = None,
    count: Annotated[int, typer.Option(min=1, help="samples per prompt")] = 4,
    against: Annotated[
        Path | None, typer.Option(help="folder of another benchmark of the set, to compare with sample by sample")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="prompts per category; default: all")] = None,
) -> None:
    """Generate and score a published prompt set; the table has a row per category."""
    from align.evaluation import sets

    if kind not in sets.FORMATS:
        raise ConfigError(f"no such format of prompts: {kind}; there are {listing(sets.FORMATS, kind)}")
    settings, run_dir = settings_of(source, overrides)
    found = sets.read_set(kind, prompts, media, limit)
    from align.evaluation.benchmark import benchmark as run
    from align.evaluation.benchmark import lines_of

    policy = None if run_dir is None else trained_of(source).folder
    results = run(settings, found, out, name=kind, count=count, policy=policy, against=against, say=echo)
    for line in lines_of(results):
        echo(line)
    echo(f"{out / 'results.md'}")
