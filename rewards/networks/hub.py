"""Lookup of weights: a folder, a file, the hub's cache, and only then the hub. No torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from alignflow import hub, text
from alignflow.files import weights
from alignflow.paths import expanded
from rewards.base import RewardError


def network(cls: Any, path: str, *, idle: tuple[str, ...] = (), strict: bool = False, **options: Any) -> Any:
    """:func:`from_pretrained` of a network, whose weights must all be there and be numbers.

    Args:
        idle: parts of keys that no score needs.
        strict: a weight in the files that the network does not have is an error too.

    Raises:
        RewardError: as :func:`from_pretrained`; or weights are missing, of another shape, NaN or infinite.
    """
    model, report = from_pretrained(cls, path, output_loading_info=True, **options)
    found = {**report, "unexpected_keys": report["unexpected_keys"] if strict else ()}
    if problems := weights.unaccounted(found, idle=idle):
        raise RewardError(f"{path} is not a whole {type(model).__name__}: {'; '.join(problems)}; download it again")
    broken = [key for key in weights.not_finite(model.state_dict().items()) if not any(part in key for part in idle)]
    if broken:
        said = f"{weights.counted(len(broken), 'weight')} not finite ({weights.first(broken)})"
        raise RewardError(f"{path} holds NaN or infinity: {said}; download it again, or load it as float32")
    return model


def from_pretrained(cls: Any, path: str, **options: Any) -> Any:
    """``cls.from_pretrained`` from a folder or the hub's cache, and from the hub only if it is not there.

    Raises:
        RewardError: neither has it, or it is damaged.
    """
    failed = f"{path} does not load as {cls.__name__}: "
    try:
        try:
            return cls.from_pretrained(path, local_files_only=True, **options)
        except OSError:
            if Path(path).is_dir():
                raise
        _ask_hub(failed, path)
        return cls.from_pretrained(path, **options)
    except RewardError:
        raise
    except Exception as error:  # transformers raises whatever its readers raise
        raise RewardError(f"{failed}{typed_line(error)}") from error


def find_model(path: str, embedded: str = "clip") -> str:
    """``path`` itself if it is a folder, a file of weights or a hub id; for ``shapes`` the folder of an embedded model.

    Embedded models are stored with the world they were trained on.

    Args:
        embedded: name of the embedded model.

    Raises:
        RewardError: none of these.
    """
    shapes = Path(str(files("alignflow.worlds.shapes"))) / "weights" / embedded
    folder = shapes if path == "shapes" else expanded(path, RewardError)
    if folder.is_dir():
        return str(folder)
    if path == "shapes":
        raise RewardError(f"there is no embedded {embedded}: no folder {folder}")
    if not is_file(path) and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise RewardError(f"no folder {folder}; model is shapes, a folder, a file of weights, or a hub id owner/name")
    return path


def is_file(reference: str) -> bool:
    """Whether ``reference`` is a file of weights: one here, or ``owner/name/file`` of the hub."""
    path = expanded(reference, RewardError)
    return path.is_file() or (not path.is_dir() and bool(path.suffix) and _on_hub(reference))


def weight_file(reference: str, hint: str = "") -> Path:
    """The file at ``reference``: a path, or ``owner/name/file`` of a hub repository, downloaded once.

    Args:
        hint: where the weights are published, for the message.

    Raises:
        RewardError: no such file here, or not to be had from the hub.
    """
    path = expanded(reference, RewardError)
    if path.is_file():
        return path
    if not _on_hub(reference):
        raise RewardError(f"no file {path}; give a file, or owner/name/file of the hub{hint and '; ' + hint}")
    from huggingface_hub import hf_hub_download

    owner, name, file = reference.split("/", 2)
    failed = f"no file {reference} here, and not from the hub: "
    try:
        try:
            return Path(hf_hub_download(f"{owner}/{name}", file, local_files_only=True))
        except OSError:
            _ask_hub(failed, reference, hint)
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except RewardError:
        raise
    except Exception as error:  # the hub's client raises errors of several packages
        said = f"{failed}{typed_line(error)}"
        raise RewardError(f"{said}; download it and give its path{hint and '; ' + hint}") from error


def typed_line(error: Exception) -> str:
    """``Type: first line`` of an error."""
    return f"{type(error).__name__}: {text.first_line(error)}"


def _on_hub(reference: str) -> bool:
    return reference.count("/") >= 2 and not reference.startswith((".", "/", "~"))


def _ask_hub(failed: str, name: str, hint: str = "") -> None:
    """Raise RewardError, which begins with ``failed``, where the hub does not answer."""
    if said := hub.unavailable(name):
        raise RewardError(f"{failed}{said}" + (f"\n  {hint}" if hint else ""))
