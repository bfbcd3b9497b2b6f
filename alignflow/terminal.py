"""Terminal output without escape sequences and secrets; all output goes through here."""

from __future__ import annotations

import typer

from alignflow.secrets import shown


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print one message; ``err``: to standard error."""
    typer.echo(shown(text), err=err, nl=nl)
