"""``alignflow recipes``, ``env`` and ``schema``: the kinds, the machine and the settings."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from align.cli.shared import AsJson, print_values, table
from alignflow.terminal import echo


def recipes(as_json: AsJson = False) -> None:
    """List the available generators, recipes, rewards, search methods and samplers."""
    from align.config.registry import reward_columns, summary

    rooms = summary()
    if as_json:
        echo(json.dumps(rooms, indent=2))
        return
    columns = {"rewards": reward_columns()}
    for room, entries in rooms.items():
        head = ["", "gradient", "scope", ""] if room in columns else []
        rows = [[f"  {kind}", *columns.get(room, {}).get(kind, ()), line] for kind, line in entries.items()]
        echo(f"{room}\n{table(head, rows)}\n")
    echo("generators, recipes, rewards and searches of your own: kind: package.module:name")


def env(
    torch: Annotated[bool, typer.Option("--torch", help="import torch and list its devices too")] = False,
    as_json: AsJson = False,
) -> None:
    """Show versions and machine, for a bug report."""
    from align.runs.environment import environment

    found = environment(torch_too=torch)
    if as_json:
        echo(json.dumps(found, indent=2))
    else:
        print_values({**{k: v for k, v in found.items() if k != "packages"}, **found["packages"]})


def schema() -> None:
    """Print the JSON schema of a config file, for editors."""
    from align.config.load import json_schema

    echo(json.dumps(json_schema(), indent=2))
