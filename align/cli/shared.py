"""Arguments and output that several commands share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.config.command_line import files_and_overrides
from alignflow.errors import RunFolderError
from alignflow.lazy import lazy
from alignflow.terminal import echo, table

if TYPE_CHECKING:
    from align.checking.reachable import within_reach
else:
    within_reach = lazy("align.checking.reachable:within_reach")


def settings_completed(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Settings, kinds and values that may follow on the command line."""
    from align.config.completing import complete

    given = [context.params.get("config") or context.params.get("source"), *(context.params.get("overrides") or [])]
    return complete(context.info_name or "", [str(word) for word in given if word], incomplete)


def kinds_of_room(context: typer.Context, incomplete: str) -> list[str]:
    """Names in the room of ``alignflow show``."""
    from align.config import showing

    room = str(context.params.get("room") or "")
    return [name for name in showing.kinds(room) if name.startswith(incomplete)] if room in showing.ROOMS else []


def runs_completed(incomplete: str) -> list[str]:
    """Run folders; the shell completes files where there is none."""
    from align.config import completing_names

    return completing_names.runs(incomplete)


def sources_completed(incomplete: str) -> list[str]:
    """Run folders and configs; the shell completes files where there is no run."""
    from align.config import completing_names

    return completing_names.sources(incomplete)


def checkpoints_completed(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """``best`` and the steps of the run on the command line."""
    from align.config import completing_names

    given = [context.params.get("source"), *context.args]  # an option without its value ends the parsing of arguments
    folder = next((Path(str(word)) for word in given if word and Path(str(word)).is_dir()), None)
    return completing_names.checkpoints(folder, incomplete)


def policies_completed(incomplete: str) -> list[str]:
    """Policies of ``alignflow pairs``."""
    from align.config import completing_names

    return completing_names.named(completing_names.POLICIES, incomplete)


def formats_completed(incomplete: str) -> list[str]:
    """Formats of ``alignflow export``."""
    from align.config import completing_names

    return completing_names.named(completing_names.FORMATS, incomplete)


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MORE.yaml|KEY=VALUE",
        help="configs merged over the first, then overrides such as train.lr=1e-4",
        autocompletion=settings_completed,
    ),
]

SourceArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG_OR_RUN", help="YAML config or run folder", show_default=False, autocompletion=sources_completed
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        metavar="best|STEP|FOLDER",
        help="checkpoint of the run: best (kept by checkpoint.best), a step or a folder; default: the newest weights",
        autocompletion=checkpoints_completed,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue an interrupted run")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="delete the contents of the run folder first")]
Out = Annotated[Path | None, typer.Option(help="run folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]

Prompt = Annotated[list[str] | None, typer.Option("--prompt", help="prompt; may be repeated")]
PromptsFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="prompts: .txt, .jsonl, .csv, .parquet or hub:owner/name[:split]")
]


def with_out(overrides: Sequence[str] | None, out: Path | None) -> list[str]:
    """The overrides, with ``--out`` as one of them."""
    return [*(overrides or []), *([f"out={json.dumps(str(out), ensure_ascii=False)}"] if out is not None else [])]


def settings_of(source: Path, words: Sequence[str] | None) -> tuple[Any, Path | None]:
    """Config of YAML files, or of a run folder together with the folder."""
    from align.config.load import load_config

    (_, *others), overrides = files_and_overrides(source, words)
    if not source.is_dir():
        return within_reach(load_config([source, *others], overrides), "generator"), None
    if not (source / "config.yaml").is_file():
        raise RunFolderError(f"{source} is not a run folder: it has no config.yaml")
    return within_reach(load_config([source / "config.yaml", *others], overrides), "generator"), source


def checkpoint_of(source: Path, name: str | None) -> Path | None:
    """The checkpoint of a run that ``--checkpoint`` names; None if it names none."""
    if name is None:
        return None
    from align.runs import best

    return best.checkpoint_of(source, name)


def trained_of(source: Path) -> Any:
    """The policy of a run or checkpoint; says so where a run is not finished."""
    from align.runs.trained import find_policy

    trained = find_policy(source)
    if trained.checkpoint and trained.folder != source:
        echo(f"{source} is not finished: its newest checkpoint is step {trained.step}", err=True)
    return trained


def prompts_of(
    texts: Sequence[str] | None, file: str | None, media: Mapping[str, Path | None] | None = None
) -> list[Any]:
    """Prompts given one by one, all with the same media, then those of a file."""
    from align.data.prompts import Prompt, read_prompts

    given = {name: path for name, path in (media or {}).items() if path is not None}
    prompts = [Prompt(text, given, place=f"--prompt {text!r}") for text in texts or ()]
    return prompts if file is None else [*prompts, *read_prompts(file)]


def print_values(values: dict[str, Any]) -> None:
    """Print names and values as two columns; values that are None are left out."""
    known = [[name, cell(value)] for name, value in values.items() if value is not None]
    echo(table([], known))


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@contextmanager
def stoppable(command: str, folder: Path, files: list[Path], overrides: list[str], out: Path | None) -> Iterator[None]:
    """Context in which an interrupt ends the command with a line on how to continue, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        again = ["alignflow", *command.split(), *map(str, files), *overrides, *(["--out", str(out)] if out else [])]
        echo(f"stopped; continue {folder} with\n  {shlex.join([*again, '--resume'])}", err=True)
        raise typer.Exit(130) from None
