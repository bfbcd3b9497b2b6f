"""A pipeline folder before loading: its contents, or its problems. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from alignflow.paths import is_file
from alignflow.text import first_line, printable
from generators.errors import GeneratorError

INDEX = "model_index.json"
LARGEST = 1 << 20  # bytes of a JSON file that is read; real ones have a few thousand
SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")
_WHOLE = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")
_VARIANT = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)\.([\w-]+?)(-\d{5}-of-\d{5})?\.(safetensors|bin)")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        GeneratorError: there is no such file, it is not JSON, or it holds something other than an object.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise GeneratorError(f"{file} has {file.stat().st_size} bytes, which is not a config; copy it again")
        found = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise GeneratorError(f"{file} cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise GeneratorError(f"{file} is nested too deeply to be a config; copy or download it again") from None
    except ValueError as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise (
            error if isinstance(error, GeneratorError) else GeneratorError(f"{file} is not JSON: {first_line(error)}")
        ) from None
    if not isinstance(found, dict):
        raise GeneratorError(f"{file} holds a {type(found).__name__}, not an object of settings; copy it again")
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder: ``_class_name`` and component -> ``[library, class]``.

    Raises:
        GeneratorError: there is none, or it is not one; the message names what the folder holds instead.
    """
    if not (folder / INDEX).is_file():
        raise GeneratorError(f"{folder} is not a diffusers pipeline: it has no model_index.json{_instead(folder)}")
    index = read_json(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        said = printable(index.get("_class_name"), 60)
        raise GeneratorError(f"{folder / INDEX}: _class_name is {said}, not the name of a diffusers pipeline")
    for name, entry in index.items():
        if isinstance(entry, list) and not _is_component(name, entry):
            raise GeneratorError(
                f"{folder / INDEX}: {printable(name, 60)!r} is {printable(entry, 100)}, not [library, class]"
            )
    return index


def _is_component(name: str, entry: list[Any]) -> bool:
    if not (name.isidentifier() or name.startswith("_")):
        return False
    texts = len(entry) == 2 and all(value is None or isinstance(value, str) for value in entry)
    numbers = bool(entry) and all(isinstance(value, int | float) for value in entry)
    return name.startswith("_") or texts or numbers


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Component -> (library, class) of those that a pipeline has."""
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and all(entry)
        and isinstance(entry[0], str)
    }  # fmt: skip


def check_parts(folder: Path, index: dict[str, Any]) -> None:
    """Raise GeneratorError if a component has no folder, or its weights are there as a variant only."""
    missing = [name for name in components(index) if not (folder / name).is_dir()]
    if missing:
        raise GeneratorError(f"{folder} is incomplete: it lacks {', '.join(missing)} of model_index.json")
    for name in components(index):
        files = [file.name for file in (folder / name).iterdir()]
        variants = sorted({found[2] for file in files if (found := _VARIANT.fullmatch(file)) and found[2] != "index"})
        if variants and not any(_WHOLE.fullmatch(file) for file in files):
            raise GeneratorError(
                f"{folder / name} holds weights of the variant {' and '.join(variants)} only; write the folder once "
                f"without it: {index['_class_name']}.from_pretrained({str(folder)!r}, variant={variants[0]!r})"
                ".save_pretrained(NEW_FOLDER)"
            )


def single_file(path: Path) -> str:
    """Advice for a checkpoint that is one file instead of a folder; '' if ``path`` is not such a file."""
    if not (is_file(path) and path.suffix.lower() in SINGLE):
        return ""
    return (
        f"{path} is a single file; a pipeline is a folder. Write one once: PIPELINE_CLASS.from_single_file("
        f"{str(path)!r}).save_pretrained(FOLDER), with the class of the model in diffusers"
    )


def _instead(folder: Path) -> str:
    """Content of a folder without an index, as far as it helps."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return ""
    inner = [name for name in names if (folder / name / INDEX).is_file()]
    if inner:
        return f"; did you mean {folder / inner[0]}?"
    if "config.json" in names:
        return "; it has a config.json: one component of a pipeline, or a model of another library"
    weights = [name for name in names if name.lower().endswith(SINGLE)]
    if weights:
        return f"; it holds {weights[0]}: {single_file(folder / weights[0])}"
    return f"; it holds {', '.join(names[:5])}" if names else "; it is empty"
