"""Terminal output without escape sequences and secrets; all output goes through here. Tables as aligned columns."""

from __future__ import annotations

import typer

from alignflow.secrets import shown


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print one message; ``err``: to standard error."""
    typer.echo(shown(text), err=err, nl=nl)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned columns."""
    lines = [head, *rows] if head else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
