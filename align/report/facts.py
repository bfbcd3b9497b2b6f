"""The small print of a run: how long, how much, which files, how to use the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align import registry
from align.report.reading import Run, number
from generators.shapes import WORLDS

MAX_FILES = 40
EMBEDDED = "from generators.shapes import weights\n"
LOAD_IMAGE = "from diffusers.utils import load_image\n"
LORA = "lora/pytorch_lora_weights.safetensors"
LORA_2 = "lora/pytorch_lora_weights_transformer_2.safetensors"


def facts(run: Run) -> list[tuple[str, str]]:
    """Label and value of what can be said in a number."""
    seconds = number(run.summary.get("seconds") or (run.train[-1].get("seconds") if run.train else None))
    prompts = number(run.evals[-1].get("prompts")) if run.evals else None
    found = [
        ("time", duration(seconds) if seconds is not None else None),
        ("training steps", f"{run.steps:,}"),
        ("images made", _count(run.summary.get("images"))),
        ("network calls", _count(run.summary.get("network_calls"))),
        ("held-out prompts", _count(prompts)),
        ("seed", str(run.summary["seed"]) if "seed" in run.summary else None),
    ]
    return [(label, value) for label, value in found if value is not None]


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``; the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def listing(folder: Path) -> list[tuple[str, str]]:
    """Path and size of the run's files; a folder of samples or a checkpoint counts as one entry."""
    entries = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "report.html":
            continue
        inner = path.name in ("samples", "checkpoints") and path.is_dir()
        entries += sorted(p for p in path.iterdir() if not p.name.startswith(".")) if inner else [path]
    return [(_shown(path, folder), _size(path)) for path in entries[:MAX_FILES]]


def lora_snippet(run: Run) -> str | None:
    """The lines of diffusers that use the result; None before there is a LoRA."""
    if not (run.folder / LORA).exists():
        return None
    generator = run.section("generator")
    embedded = generator.get("path") in WORLDS
    base = (
        f"weights({_quoted(generator.get('kind'))})" if embedded else _quoted(generator.get("path") or "the base model")
    )
    result, field = ("clip", "frames") if run.samples and run.samples[0].clips else ("image", "images")
    folder = run.folder.resolve().name + "/lora"
    second = ""
    if (run.folder / LORA_2).exists():
        second = f"pipeline.load_lora_weights({_quoted(folder)}, weight_name={_quoted(Path(LORA_2).name)}, "
        second += "load_into_transformer_2=True)\n"
    said = _quoted(run.samples[0].prompts[0] if run.samples else "a prompt")
    media = registry.inputs(str(generator.get("kind")))
    given = "".join(f", {name}=load_image({_quoted(f'{name}.png')})" for name in media)
    return (
        "from diffusers import DiffusionPipeline\n"
        f"{LOAD_IMAGE if media else ''}"
        f"{EMBEDDED if embedded else ''}\n"
        f"pipeline = DiffusionPipeline.from_pretrained({base})\n"
        f"pipeline.load_lora_weights({_quoted(folder)})\n{second}"
        f"{result} = pipeline({'prompt=' if media else ''}{said}{given}{_drawn_at(generator)}).{field}[0]"
    )


def _drawn_at(generator: dict[str, Any]) -> str:
    """What the run told the pipeline about size and length, as arguments; empty where all is its own default."""
    height, width = generator.get("size") or (None, None)
    given = {"height": height, "width": width, "num_frames": generator.get("frames")}
    given["max_sequence_length"] = generator.get("text_length")
    return "".join(f", {name}={value}" for name, value in given.items() if value is not None)


def environment(run: Run) -> list[tuple[str, str]]:
    """Name and value of what the run ran on; what is not known is left out."""
    return [(name, _flat(value)) for name, value in run.environment.items() if value not in (None, "", [], {})]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(part)}" for name, part in value.items() if part not in (None, []))
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _quoted(text: Any) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def _count(value: Any) -> str | None:
    known = number(value)
    return None if known is None else f"{known:,.0f}"


def _shown(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")


def _size(path: Path) -> str:
    size = float(
        sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
    )
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
