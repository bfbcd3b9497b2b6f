"""The command ``alignflow export``: a trained policy for other programs, on this machine or on the hub."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.cli.shared import (
    AsJson,
    Checkpoint,
    checkpoint_of,
    formats_completed,
    print_values,
    runs_completed,
    trained_of,
)
from alignflow.errors import ConfigError
from alignflow.terminal import echo

if TYPE_CHECKING:
    from alignflow.upload import Target


Source = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="run folder, checkpoint or, with --push, an export",
        show_default=False,
        autocompletion=runs_completed,
    ),
]
To = Annotated[
    str,
    typer.Option(
        help="diffusers, comfyui, kohya (LoRA files) or merged (whole pipeline)", autocompletion=formats_completed
    ),
]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: float32 (merged: as in the run)")]
Average = Annotated[
    bool, typer.Option("--average", help="write experts with a gate as one LoRA with their mean shares over time")
]
Push = Annotated[
    str | None, typer.Option(metavar="OWNER/NAME", help="upload to this model repository of the Hugging Face hub")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="with --push: show files, sizes and model card, and upload nothing")
]
Public = Annotated[bool, typer.Option("--public", help="with --push: create a public repository; default: private")]


def export(
    source: Source,
    to: To = "diffusers",
    out: Annotated[Path | None, typer.Option(help="new folder; default: export/<to> in the run folder")] = None,
    dtype: DType = None,
    average: Average = False,
    checkpoint: Checkpoint = None,
    push: Push = None,
    dry_run: DryRun = False,
    public: Public = False,
    revision: Annotated[str | None, typer.Option(help="with --push: branch; default: main")] = None,
    message: Annotated[str | None, typer.Option(help="with --push: commit message")] = None,
    as_json: AsJson = False,
) -> None:
    """Export a trained policy for other programs, then reload it and compare; upload it with --push."""
    words = {"--dry-run": dry_run, "--public": public, "--revision": revision, "--message": message}
    if push is None:
        if given := [word for word, value in words.items() if value]:
            raise ConfigError(f"{' and '.join(given)} belongs to --push OWNER/NAME")
        _told(_written(source, to, out, dtype, average, checkpoint), as_json)
        return
    from alignflow import upload
    from alignflow.hub import offline

    target = upload.Target(push, public, revision or "main", message)
    target.check()
    api = None if dry_run else upload.connected()  # a missing token fails here, before minutes of export
    if is_export(source):
        folder, found = source, dict[str, Any]()
    else:
        if is_export(folder := out or source / "export" / to):
            raise ConfigError(
                f"{folder} exists. Upload it with `alignflow export {folder} --push {push}`, or write a new one "
                "with --out"
            )
        with offline() if dry_run else nullcontext():
            found = _written(source, to, out, dtype, average, checkpoint)
        folder = Path(found["folder"])
    if api is not None:
        found |= {"url": upload.push(folder, target, api)}
    if as_json:
        found |= {"repository": push, "uploads": dict(upload.listing(folder)), "dry_run": dry_run}
    _told(found, as_json)
    if not as_json:
        _listed(folder, target, uploaded=api is not None)


def is_export(folder: Path) -> bool:
    """Whether ``alignflow export`` wrote this folder: its model card says so, and weights are beside it."""
    from align.report.reading import front_matter, read_yaml

    try:
        header = read_yaml(front_matter((folder / "README.md").read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        return False
    known = "alignflow" in (header.get("tags") or []) and not (folder / "config.yaml").is_file()
    return known and next(folder.rglob("*.safetensors"), None) is not None


def _written(
    source: Path, to: str, out: Path | None, dtype: str | None, average: bool, checkpoint: str | None
) -> dict[str, Any]:
    trained = trained_of(checkpoint_of(source, checkpoint) or source)
    from align.export import export as write

    return write(trained, to, out, dtype, average)


def _told(found: dict[str, Any], as_json: bool) -> None:
    """Findings of an export; nothing if none was written."""
    if as_json:
        echo(json.dumps(found, indent=2))
        return
    if "files" not in found:
        return
    from align.export import sentence

    print_values({name: found[name] for name in ("folder", "from", "step")} | {"files": len(found["files"])})
    echo(sentence(found))
    if found["warning"]:
        echo(f"warning: {found['warning']}", err=True)


def _listed(folder: Path, target: Target, uploaded: bool) -> None:
    """The files of an upload with their sizes; for one that is only shown, the card too."""
    from align.report.facts import bytes_text
    from alignflow.upload import listing

    files = listing(folder)
    kind = "public" if target.public else "private"
    where = f"{target.repo}, {target.revision}, {kind}"
    echo(f"uploaded to {where}: {target.url}" if uploaded else f"would be uploaded to {where}:")
    sizes = [bytes_text(size) for _, size in files]
    for (name, _), size in zip(files, sizes, strict=True):
        echo(f"  {size.rjust(max(map(len, sizes)))}  {name}")
    echo(f"{len(files)} files, {bytes_text(sum(size for _, size in files))}")
    if not uploaded:
        echo(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}")
        echo(f"nothing was uploaded; upload with: alignflow export {folder} --push {target.repo}")
