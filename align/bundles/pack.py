"""``alignflow bundle``: a finished training run with all files that it read, paths made relative. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.bundles import archive
from align.bundles.archive import BundleError
from align.config.load import dump_yaml, read_yaml
from align.config.paths import named
from align.data.tables import read_rows
from align.report.facts import bytes_text
from align.runs import metrics, owned
from align.runs.identity import flatten, model_digest
from alignflow.errors import DataError
from alignflow.files.disk import LITTER
from alignflow.paths import is_file

CONFIG, RECORD = "config.yaml", "record"
FILES, MISSING = "files/", "missing/"
"""Starts of the paths in a bundle's config: of what it holds, and of what was too large."""
KEPT = ("environment.json", "metrics.jsonl", "summary.json")
TABLES = (".jsonl", ".csv", ".parquet")
LIMIT = 100_000_000
"""Bytes up to which a model, a LoRA or the media of a table are packed."""


@dataclass
class Packing:
    """Content of a bundle so far.

    Args:
        limit: bytes up to which a file or folder is packed; tables and code always are.
        files: name in the bundle -> file.
        left_out: what was too large: its name in the config, its size.
        names: file or folder -> its name in the config.
    """

    limit: int
    files: dict[str, Path] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def name(self, path: str) -> str:
        """Pack a file or folder; what the bundle's config writes for it."""
        found = Path(path).resolve()
        if str(found) not in self.names:
            self.names[str(found)] = self._pack(found, f"{len(self.names)}/{found.name}")
        return self.names[str(found)]

    def _pack(self, path: Path, name: str) -> str:
        inside = {name: path} if path.is_file() else dict(_inside(path, name))
        size = sum(file.stat().st_size for file in inside.values())
        always = path.suffix in (".py", ".txt", ".yaml", ".yml", *TABLES)
        if size > self.limit and not always:
            self.left_out.append({"name": MISSING + name, "bytes": size, "digest": _digest(path)})
            return MISSING + name
        self.files |= {FILES + inner: file for inner, file in inside.items()}
        if path.suffix in TABLES:
            self._pack_media(path, name)
        return FILES + name

    def _pack_media(self, table: Path, name: str) -> None:
        """Files beside a table that its cells name."""
        media = dict(_media(table))
        size = sum(file.stat().st_size for file in media.values())
        if size > self.limit:
            self.left_out.append({"name": FILES + name, "media": len(media), "bytes": size})
            return
        folder = FILES + name.rpartition("/")[0]
        self.files |= {f"{folder}/{inner}": file for inner, file in media.items()}


def pack(run: Path, out: Path, limit: int = LIMIT) -> dict[str, Any]:
    """Write a run as a bundle: config, prompts, tables, own code, models up to ``limit``, versions and results.

    Args:
        run: folder of a training run.
        out: the file to write; it must not exist.
        limit: bytes up to which a model, a LoRA, or all media of a table are packed.

    Returns:
        The manifest.

    Raises:
        BundleError: not a finished training run, or the file exists.
    """
    if owned.read_mark(run).get("kind") != owned.TRAINING:
        raise BundleError(f"{run} is not a training run; name a folder that `alignflow train` wrote")
    if not (run / "summary.json").is_file():
        raise BundleError(f"{run} is not finished: continue it with --resume, or bundle it when it ends")
    if out.exists():
        raise BundleError(f"{out} exists; choose another file")
    packing = Packing(limit)
    settings = {key: value for key, value in read_yaml(run / CONFIG).items() if key != "out"}
    config = named(settings, packing.name)
    files: dict[str, Path | bytes] = {**packing.files, CONFIG: dump_yaml(config).encode()}
    files |= {f"{RECORD}/{name}": run / name for name in KEPT if (run / name).is_file()}
    about = {
        "name": config["name"],
        "seed": config["seed"],
        "model": model_digest(str(settings["generator"]["path"])),
        "modules": sorted(_modules(config)),
        "left_out": packing.left_out,
        "changed": [row["changed"] for row in metrics.read(run / "metrics.jsonl")[0] if row.get("event") == "resumed"],
        "packages": _packages(run),
        "result": results(run),
    }
    return archive.write(out, files, about)


def results(run: Path) -> dict[str, str]:
    """Name -> SHA-256 of the trained weights of a finished run."""
    folders = [run / name for name in ("lora", "transformer", "transformer_2") if (run / name).is_dir()]
    files = sorted(file for folder in folders for file in folder.rglob("*.safetensors"))
    return {file.relative_to(run).as_posix(): archive.digest_of(file) for file in files}


def said(manifest: dict[str, Any]) -> Iterator[str]:
    """Notes on a bundle for people, a sentence each."""
    for one in manifest["left_out"]:
        what = f"{one['media']} media of {one['name']}" if "media" in one else one["name"].removeprefix(MISSING)
        yield f"left out, {bytes_text(one['bytes'])}: {what}; --limit packs larger files"
    for module in manifest["modules"]:
        yield f"the other machine needs the module {module}, which the config names"
    if manifest["changed"]:
        yield "the run was resumed with other settings; a repeat uses its last settings from the start"


def _inside(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not LITTER.fullmatch(file.name):
            yield f"{name}/{file.relative_to(folder).as_posix()}", file


def _media(table: Path) -> Iterator[tuple[str, Path]]:
    try:
        for _, row in read_rows(str(table)):
            for value in row.values():
                if isinstance(value, str) and len(value) < 300 and is_file(table.parent / value):
                    relative = Path(value)
                    if not relative.is_absolute() and ".." not in relative.parts:
                        yield relative.as_posix(), table.parent / relative
    except DataError as error:
        raise BundleError(f"the run read {table}, which cannot be read now: {error}") from None


def _digest(path: Path) -> str:
    return archive.digest_of(path) if path.is_file() else model_digest(str(path))


def _modules(config: dict[str, Any]) -> set[str]:
    """Modules that kinds such as ``package.module:name`` name."""
    kinds = [str(value) for key, value in flatten(config).items() if key.rpartition(".")[2] == "kind"]
    return {kind.rpartition(":")[0] for kind in kinds if ":" in kind and not kind.startswith(FILES)}


def _packages(run: Path) -> dict[str, str]:
    """Versions with which the run was made; empty if it did not note them."""
    try:
        found = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        return {"python": found["python"], **found["packages"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
