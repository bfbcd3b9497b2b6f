"""``alignflow repeat``: trains the run of a bundle again in another folder, and compares the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.bundles import archive
from align.bundles.archive import MANIFEST, BundleError
from align.bundles.pack import CONFIG, FILES, MISSING, results
from align.config.load import dump_yaml, load_config, read_overrides, read_yaml
from align.data.files import write_text
from align.report.facts import bytes_text
from align.runs.environment import environment
from align.runs.identity import flatten, model_digest
from alignflow.lazy import lazy

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.training.trainer import train
else:
    train = lazy("align.training.trainer:train")

PLACED = "run.yaml"
"""The bundle's config with the paths of the folder into which it was unpacked."""


@dataclass(frozen=True)
class Bundle:
    """An unpacked bundle.

    Args:
        folder: where it is.
        manifest: see :func:`align.bundles.pack.pack`.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def run(self) -> Path:
        """The folder of the repeated run."""
        return self.folder / "run"


def opened(source: Path, folder: Path | None = None) -> Bundle:
    """Unpack a bundle, or find one that was unpacked before.

    Args:
        source: the bundle, or the folder into which it was unpacked.
        folder: a new folder; by default one in the working folder, called like the bundle without ``.tar``.

    Raises:
        BundleError: not a bundle, or damaged.
    """
    if source.is_dir():
        file = source / MANIFEST
        if not file.is_file():
            raise BundleError(f"{source} is not an unpacked bundle: it has no {MANIFEST}")
        bundle = Bundle(source, archive.parsed(file.read_bytes(), str(source)))
    else:
        folder = folder or Path(source.stem)
        bundle = Bundle(folder, archive.unpack(source, folder))
    tree = {**read_yaml(bundle.folder / CONFIG), "out": str(bundle.run.absolute())}
    write_text(bundle.folder / PLACED, dump_yaml(_placed(tree, bundle.folder.absolute())))
    return bundle


def config_of(bundle: Bundle, overrides: Sequence[str] = (), *, code: bool = False) -> Config:
    """The config of a bundle's run with the paths of this machine.

    Args:
        overrides: as of ``alignflow train``; they name what was too large for the bundle.
        code: whether Python files of the bundle may run.

    Raises:
        BundleError: the bundle brings code that may not run, or something that it lacks is not named.
    """
    files = [str(bundle.folder / name) for name in bundle.manifest["files"] if name.endswith(".py")]
    if files and not code:
        raise BundleError(f"the bundle contains code: {', '.join(files)}. Read it, then add --import to run it")
    given = {key for layer in read_overrides(overrides) for key in flatten(layer.data)}
    sizes = {one["name"]: one["bytes"] for one in bundle.manifest["left_out"]}
    for key, value in flatten(read_yaml(bundle.folder / PLACED)).items():
        if isinstance(value, str) and value.startswith(MISSING) and key not in given:
            size = f" ({bytes_text(sizes[value])})" if value in sizes else ""
            name = value.rpartition("/")[2]
            raise BundleError(f"{name}{size} was too large for the bundle: name it with {key}=PATH")
    return load_config(bundle.folder / PLACED, overrides)


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _placed(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [_placed(part, folder) for part in value]
    return f"{folder}/{value}" if isinstance(value, str) and value.startswith(FILES) else value


def differences(bundle: Bundle, config: Config) -> list[str]:
    """Differences between this machine and that of the first run, a sentence each."""
    here = environment()
    versions = {"python": here["python"], **here["packages"]}
    found = [
        f"{name} is {versions.get(name)} here and was {version}"
        for name, version in bundle.manifest["packages"].items()
        if versions.get(name) != version
    ]
    if model_digest(config.generator.path) != bundle.manifest["model"]:
        found.append(f"{config.generator.path} is not the base model of the first run")
    return found


def repeat(bundle: Bundle, config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Train, and compare the weights with those of the first run.

    Returns:
        The summary of the run, with ``equal``: whether all trained weights are the same bit for bit.
    """
    summary = train(config, resume=resume)
    return {**summary, "equal": results(config.run_dir) == bundle.manifest["result"]}
