"""``alignflow new`` and ``show``: a config to start from, and one kind in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.cli.shared import kinds_of_room
from align.data.files import writing
from alignflow.errors import ConfigError
from alignflow.terminal import echo


def new(
    out: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="config to write", show_default=False)],
    model: Annotated[str, typer.Option(help="pipeline folder, hub id owner/name, or shapes")],
    prompts: Annotated[str, typer.Option(help="training prompts: .txt, .jsonl, .csv, .parquet or hub:owner/name")],
    reward: Annotated[str, typer.Option(help="reward kind, file.py:function, or {kind: ..., ...}")],
    recipe: Annotated[str, typer.Option(help="recipe kind")] = "nft",
    generator: Annotated[str | None, typer.Option(help="adapter of the model; default: found from its folder")] = None,
    heldout: Annotated[str | None, typer.Option(help="held-out prompts, for evaluation")] = None,
    device: Annotated[str, typer.Option(help="device: auto, cpu, cuda, cuda:1 or mps")] = "auto",
) -> None:
    """Write a commented config for a model, prompts and a reward; the config passes check."""
    from align.checking.commands import examine
    from align.config.starter import starter

    if out.exists():
        raise ConfigError(f"{out} exists; choose another name")
    text = starter(model, prompts, reward, recipe=recipe, generator=generator, heldout=heldout, device=device)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    try:
        list(examine([out], [], False, None, False))
    except BaseException:
        out.unlink()
        raise
    echo(f"{out}\ncheck it:  alignflow check {out}\ntrain:     alignflow train {out}")


def rooms(incomplete: str) -> list[str]:
    """Rooms of :func:`show` that begin so."""
    from align.config.showing import ROOMS

    return [room for room in ROOMS if room.startswith(incomplete)]


def show(
    room: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="recipe, reward, search, generator, sampler or world", autocompletion=rooms
        ),
    ],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="as alignflow recipes lists it", autocompletion=kinds_of_room)
    ],
) -> None:
    """Show one recipe, reward, search, generator, sampler or world: settings, defaults, source, an example."""
    from align.config import showing

    echo(showing.show(room, name))
