"""The ``alignflow`` command. Each subcommand parses arguments and calls one function; torch is imported if needed."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from align.cli import about, pages
from align.cli import data as data_cli
from align.cli import pairs as pairs_cli
from align.cli import prompts as prompts_cli
from align.cli import reward as reward_cli
from align.cli.benchmark import benchmark
from align.cli.bundle import bundle, repeat
from align.cli.doctor import doctor
from align.cli.export import export
from align.cli.label import label
from align.cli.new import new, show
from align.cli.shared import (
    AsJson,
    Checkpoint,
    ConfigArgument,
    Overrides,
    Prompt,
    PromptsFile,
    SourceArgument,
    cell,
    checkpoint_of,
    print_values,
    prompts_of,
    settings_of,
    table,
    trained_of,
    with_out,
    within_reach,
)
from align.cli.sweep import sweep
from align.cli.ui import ui
from align.config.command_line import files_and_overrides
from align.data.files import without_nan
from alignflow.cores import set_up
from alignflow.errors import AlignflowError, ConfigError, RunFolderError
from alignflow.renamed import check_words
from alignflow.terminal import echo
from alignflow.words import count as counted

app = typer.Typer(
    name="alignflow",
    help="Align diffusion and flow generators with rewards.",
    epilog="Add --debug to any command to see the traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(reward_cli.app)
app.command(epilog="Example: alignflow benchmark runs/shapes-nft geneval evaluation_metadata.jsonl --out geneval")(
    benchmark
)
app.command(epilog="Example: alignflow label pairs.parquet --out votes.jsonl")(label)
app.command(epilog="Example: alignflow ui runs")(ui)
app.add_typer(prompts_cli.app)
app.add_typer(data_cli.app)


ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
"""Read when a library is first imported."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. User mistakes become ``error: ...`` and an exit code, never a traceback."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    set_up(os.environ)
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    for word, following in zip(given, [*given, ""][1:], strict=True):
        if option := re.fullmatch(r"--(\w+(?:\.\w+)+)(?:=(.*))?", word, re.DOTALL):
            meant = f"{option[1]}={option[2] or following or 'VALUE'}"
            echo(f"error: settings are written without dashes: {meant}, not {word}", err=True)
            sys.exit(2)
    try:
        check_words(given)
        app(given)
    except Exception as error:
        explained = _explained(error, given[0] if given else "")
        if debug or explained is None:
            echo(traceback.format_exc(), err=True)
        code, message = explained or (1, "this is a bug in alignflow or in a plug-in; the traceback is above")
        echo(f"error: {message}", err=True)
        sys.exit(code)


SMALLER = "memory.vae_tiling=true, generator.dtype=bfloat16"
LESS_MEMORY = {
    **dict.fromkeys(("sample", "evaluate"), f"\n  lower it with a smaller evaluate.chunk, {SMALLER}"),
    "search": f"\n  lower it with a smaller batch, chunk or decode_chunk, {SMALLER}",
}
"""Command -> advice for less memory; training suggests its own settings."""


def _explained(error: Exception, command: str = "") -> tuple[int, str] | None:
    """(exit code, message) of an error that a user can fix, None for any other."""
    if isinstance(error, AlignflowError):
        return error.exit_code, str(error)
    from align.checking.remedies import out_of_memory

    if reason := out_of_memory(error):
        return 1, f"out of memory: {reason}{LESS_MEMORY.get(command, '')}"
    return None


@app.callback(invoke_without_command=True)
def _options(show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if show_version:
        echo(f"alignflow {version('alignflow')}")
        raise typer.Exit


@app.command(epilog="Example: alignflow train configs/shapes/nft.yaml train.lr=1e-4 --out runs/first")
def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume from the newest checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete the contents of the run folder first")] = False,
    out: Annotated[Path | None, typer.Option(help="run folder")] = None,
) -> None:
    """Fine-tune a generator; writes a run folder."""
    files, overrides = files_and_overrides(config, overrides)
    from align.config.load import load_config

    settings = within_reach(load_config(files, with_out(overrides, out)))
    from align.training.trainer import train as run

    try:
        summary = run(settings, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        again = ["alignflow", "train", *map(str, files), *overrides, *(["--out", str(out)] if out else [])]
        echo(f"stopped; continue {settings.run_dir} with\n  {shlex.join([*again, '--resume'])}", err=True)
        raise typer.Exit(130) from None
    if int(os.environ.get("RANK", "0")) == 0:
        from align.report import headline

        parts = {f"reward/{name}": ends for name, ends in (summary.pop("reward_parts", None) or {}).items()}
        told = {name: f"{cell(ends['before'])} -> {cell(ends['after'])}" for name, ends in parts.items()}
        print_values({**summary, **told, "folder": str(settings.run_dir)})
        if (page := settings.run_dir / "report.html").is_file():
            echo(f"{headline(settings.run_dir)}\nreport: {page}")


@app.command(
    epilog="Example: alignflow launch --processes 2 train configs/shapes/nft.yaml --out runs/two",
    context_settings={"allow_interspersed_args": False},
)
def launch(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND ...", help="command to run", show_default=False)],
    processes: Annotated[int, typer.Option(min=1, max=1024, help="processes here, one per GPU")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of the rendezvous; 0 = a free port")] = 0,
    host: Annotated[str, typer.Option(help="address of the first machine")] = "127.0.0.1",
    nodes: Annotated[int, typer.Option(min=1, help="machines, each with its own --node")] = 1,
    node: Annotated[int, typer.Option(min=0, help="index of this machine, from 0")] = 0,
) -> None:
    """Run a command in several processes, on CPUs or one per GPU."""
    from alignflow.launch import launch as start

    if nodes > 1 and not port:
        raise ConfigError("--nodes needs a --port, the same on every machine")
    if node >= nodes:
        raise ConfigError(f"--node {node}: machines are numbered from 0 to {nodes - 1}")
    raise typer.Exit(start(command, processes, port=port, host=host, nodes=nodes, node=node))


@app.command(epilog="Example: alignflow search configs/shapes/search_guidance.yaml budget.network_calls=400")
def search(
    source: SourceArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue with the prompts not searched yet")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="delete the contents of the run folder first")] = False,
    out: Annotated[Path | None, typer.Option(help="run folder")] = None,
    write_as: Annotated[
        tuple[str, Path] | None, typer.Option("--as", help="export the results: pairs FOLDER or finetune FOLDER")
    ] = None,
) -> None:
    """Search for better samples within a counted budget, without training; or export a finished search as data."""
    from align.search.export import check_target
    from align.search.export import write_as as write

    files, overrides = files_and_overrides(source, overrides)
    run_dir = source
    if not source.is_dir():
        from align.search.settings import load_search

        settings = within_reach(load_search(files, with_out(overrides, out)))
        run_dir = settings.run_dir
        if write_as is not None:
            check_target(run_dir, *write_as)
        from align.search.run import run_search

        try:
            summary = run_search(settings, resume=resume, overwrite=overwrite)
        except KeyboardInterrupt:
            again = ["alignflow", "search", *map(str, files), *overrides, *(["--out", str(out)] if out else [])]
            echo(f"stopped; continue {run_dir} with\n  {shlex.join([*again, '--resume'])}", err=True)
            raise typer.Exit(130) from None
        print_values({**_searched(summary), "folder": str(run_dir)})
        if (page := run_dir / "report.html").is_file():
            from align.report.search import headline

            echo(f"{headline(run_dir)}\nreport: {page}")
    elif write_as is None:
        raise RunFolderError(f"{source} is a folder: name a config to search, or add --as pairs FOLDER")
    if write_as is not None:
        kind, folder = write_as
        echo(f"{counted(write(run_dir, kind, folder), 'pair' if kind == 'pairs' else 'sample')} in {folder}")


def _searched(summary: dict[str, Any]) -> dict[str, Any]:
    """Results of a search by name: scores of the plain and the best samples, costs, best-of-N where it was run."""
    scores = {"reward": summary["reward"], **{f"gold {name}": one for name, one in summary["gold"].items()}}
    found = {name: f"{cell(one['plain'])} -> {cell(one['best'])}" for name, one in scores.items()}
    costs = {f"{name.replace('_', ' ')} a prompt": value for name, value in summary["spent"].items()}
    if best := summary.get("best_of_n"):
        same = {"reward": best["reward"], **{f"gold {name}": one for name, one in best["gold"].items()}}
        told = ", ".join(f"{name} {cell(one['best_of_n'])}" for name, one in same.items())
        costs["best_of_n"] = f"{told}, {cell(best['spent'].get('network_calls', 0.0))} network calls a prompt"
    return {"prompts": summary["prompts"], **found, **costs}


@app.command(epilog="Example: alignflow check configs/shapes/nft.yaml rollout.group=24")
def check(
    config: ConfigArgument,
    overrides: Overrides = None,
    memory: Annotated[bool, typer.Option("--memory", help="estimate GPU memory; takes seconds")] = False,
    card: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="check that the run fits on a card, such as 24gb, or suggest changes"),
    ] = None,
    run_code: Annotated[
        bool, typer.Option("--import", help="import custom rewards, recipes, searches, generators")
    ] = False,
) -> None:
    """Validate a config without running it: all problems, the resolved settings, the batch size in words."""
    files, overrides = files_and_overrides(config, overrides)
    from align.checking.commands import examine

    for line in examine(files, overrides, memory or card is not None, card, run_code):
        echo(line)


@app.command(epilog='Example: alignflow sample runs/shapes-nft --prompt "a red circle" --count 4 --out samples')
def sample(
    source: SourceArgument,
    overrides: Overrides = None,
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    image: Annotated[Path | None, typer.Option(help="source image for each --prompt, for editors")] = None,
    mask: Annotated[Path | None, typer.Option(help="mask for each --prompt; white is regenerated")] = None,
    lora: Annotated[
        Path | None, typer.Option(help="LoRA file, or folder with one or with transformer/; default: the run's")
    ] = None,
    checkpoint: Checkpoint = None,
    count: Annotated[int, typer.Option(min=1, help="samples per prompt")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="random seed of the noise")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the samples")] = Path("samples"),
) -> None:
    """Sample from a config's generator or a run's policy into a folder."""
    settings, run_dir = settings_of(source, overrides)
    if checkpoint is not None and (run_dir is None or lora is not None):
        raise ConfigError("--checkpoint names a checkpoint of a run folder; it goes with neither a config nor --lora")
    if run_dir is not None and lora is None:
        lora = trained_of(checkpoint_of(run_dir, checkpoint) or run_dir).folder
    from align.evaluation.evaluate import sample_to_folder

    prompts = prompts_of(prompt, prompts_file, {"image": image, "mask": mask}) or None
    folder = sample_to_folder(settings, out, prompts=prompts, count=count, seed=seed, policy=lora)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        echo(file)
    echo(folder)


@app.command(epilog="Example: alignflow score samples --reward shapes --out scores.csv")
def score(
    files: Annotated[
        list[Path], typer.Argument(help="images, videos, folders, or tables with image and prompt", show_default=False)
    ],
    reward: Annotated[
        list[str], typer.Option(help="kind, {kind: ..., ...} or .yaml file; name=... sets the column; may be repeated")
    ],
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    device: Annotated[str, typer.Option(help="device: auto, cpu, cuda, cuda:1 or mps")] = "auto",
    chunk: Annotated[int, typer.Option(min=1, help="samples scored at a time")] = 16,
    out: Annotated[
        Path | None,
        typer.Option(
            help="output .csv, .jsonl, .json or .parquet, written as scores arrive, with parts of scores in columns "
            "reward/part; existing rows are kept"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score images or videos with rewards: one prompt for all, one each, or the prompts of a sample folder or table."""
    from align.cli.score import run

    prompts = prompts_of(prompt, prompts_file)
    code = run(
        files, reward, prompts, device=device, chunk=chunk, out=out, as_json=as_json, table=table, cell=cell
    )  # fmt: skip
    if code:
        raise typer.Exit(code)


app.command(epilog="Example: alignflow pairs configs/shapes/nft.yaml prompts.limit=64 --count 8 --out my/pairs")(
    pairs_cli.pairs
)


@app.command(epilog="Example: alignflow evaluate runs/shapes-nft evaluate.prompts=1024")
def evaluate(
    source: SourceArgument,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    lora: Annotated[
        Path | None, typer.Option(help="LoRA file or folder to evaluate on the base, instead of a run's policy")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a config's base model, a run's policy or a LoRA on held-out prompts."""
    settings, run_dir = settings_of(source, overrides)
    from align.evaluation.evaluate import evaluate_run

    folder = checkpoint_of(source, checkpoint)
    row = evaluate_run(settings, run_dir=run_dir, checkpoint=folder, lora=lora)
    if as_json:
        echo(json.dumps(without_nan(row), indent=2))
        return
    scores = [
        [name, cell(value), cell(row["stderr"][name]), str(row["missing"][name])]
        for name, value in row["scores"].items()
    ]
    echo(table(["reward", "mean", "stderr", "missing"], scores))
    echo(f"{row['prompts']} held-out prompts, {row['seconds']:.1f} s")


app.command(epilog="Example: alignflow bundle runs/shapes-nft shapes-nft.tar")(bundle)
app.command(epilog="Example: alignflow repeat shapes-nft.tar --out again")(repeat)
app.command(epilog="Example: alignflow export runs/shapes-nft --to comfyui --out nft-comfyui")(export)


app.command(epilog="Example: alignflow report runs/shapes-nft")(pages.report)
app.command(epilog="Example: alignflow compare runs/shapes-nft runs/shapes-awm --out compare.html")(pages.compare)
app.command(epilog="Example: alignflow sweep configs/shapes/nft.yaml train.lr=1e-3,2e-3 seed=0,1,2 --out runs/lr")(
    sweep
)


app.command(
    epilog="Example: alignflow new mine.yaml --model shapes --prompts shapes:train --reward shapes --device cpu"
)(new)
app.command(epilog="Example: alignflow show recipe nft")(show)
app.command(epilog="Example: alignflow recipes --json")(about.recipes)
app.command("list", hidden=True, epilog="Example: alignflow list --json")(about.recipes)
app.command(epilog="Example: alignflow doctor --json")(doctor)
app.command(epilog="Example: alignflow env --torch")(about.env)
app.command(epilog="Example: alignflow schema > alignflow.schema.json")(about.schema)

if __name__ == "__main__":
    main()
