"""The model card of an export: contents, measured results, and how to load it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from align.data.files import write_text
from align.report.changes import relation
from align.report.facts import duration
from align.report.reading import Run, read_run
from align.report.usage import Weights, code, differences, scheduler_of
from align.report.using import shot, visit_of

if TYPE_CHECKING:
    from align.config.settings import Config, GeneratorConfig
    from align.policy.trained import Trained

TRAINED = {"trained": " (trained on)", "part": " (a part of the trained reward)"}
PROMPTS = 4  # shown in the hub's gallery
TAGS = {
    "diffusers": ["template:diffusion-lora", "lora"],
    "comfyui": ["lora", "comfyui"],
    "kohya": ["lora"],
    "merged": [],
}


def write_card(folder: Path, config: Config, trained: Trained, to: str, found: Mapping[str, Any]) -> None:
    """Write ``README.md`` into an export, and the first and last grid of samples beside it.

    Args:
        found: what :func:`align.export.export` answers, without the card's own files.
    """
    run = read_run(trained.run)
    grids = _grids(folder, run, trained.step)
    parts = [
        f"---\n{_header(config, run, to)}\n---",
        f"# {config.name}",
        _about(config, trained, to),
        _numbers(run, trained.step),
        "\n".join(f"![{when}]({name})" for when, name in grids.items()),
        "## Use\n\n" + _use(config.generator, to, list(found["files"]), run, trained.step),
        "## Checked\n\n" + _checked(found),
        "## Settings\n\n```yaml\n" + re.sub(r"(?m)^out: .*\n", "", run.config_text).strip() + "\n```",
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _header(config: Config, run: Run, to: str) -> str:
    """The YAML that the hub reads."""
    on_hub = config.generator.path.count("/") == 1 and not Path(config.generator.path).exists()
    video = bool(run.samples and run.samples[-1].video)
    editor = any(word in config.generator.kind for word in ("edit", "kontext", "fill", "i2v"))
    relation = "adapter" if to != "merged" else "finetune" if config.policy.kind == "full" else "merge"
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=f"{'image' if editor else 'text'}-to-{'video' if video else 'image'}",
        tags=[*TAGS[to], "alignflow", "flow-matching", config.recipe.kind],
        base_model=config.generator.path if on_hub else None,
        base_model_relation=relation if on_hub else None,
        widget=[{"text": prompt} for prompt in (run.samples[-1].prompts[:PROMPTS] if run.samples else [])] or None,
    )
    return data.to_yaml().strip()


def _about(config: Config, trained: Trained, to: str) -> str:
    policy = config.policy
    kinds = {"full": "full fine-tuning", "gate": "expert LoRAs, whose shares are averaged over time here"}
    what = f"LoRA of rank {policy.rank}" if policy.kind == "lora" else kinds[policy.kind]
    if "text" in (trains := config.recipe.learners()["policy"].trains):
        what += " on the text encoders" + (" and the network" if "network" in trains else "")
    merged = ", merged into the weights" if to == "merged" and policy.kind != "full" else ""
    rest = "; the run was not finished" if trained.checkpoint else ""
    return (
        f"`{config.generator.path}` aligned with alignflow: {what}{merged}, recipe `{config.recipe.kind}`, "
        f"{trained.step} training steps{rest}."
    )


def _numbers(run: Run, step: int) -> str:
    """Held-out scores before and after, and what the run cost."""
    evals = [row for row in run.evals if row["step"] <= step]
    lines = []
    if evals:
        first, last = evals[0], evals[-1]
        before = first if first["step"] == 0 else {}
        lines = [f"## Held-out scores\n\n{last.get('prompts')} prompts.\n\n| score | base | step {last['step']} |"]
        lines += ["|---|---|---|"]
        for name in last.get("scores", {}):
            shown = name + TRAINED.get(relation(run, name), "")
            lines.append(f"| {shown} | {_score(before, name)} | {_score(last, name)} |")
    cost = {
        "training time": duration(run.summary["seconds"]) if run.summary.get("seconds") else None,
        "network calls": f"{run.summary['network_calls']:,}" if run.summary.get("network_calls") else None,
        "seed": run.summary.get("seed"),
    }
    told = ", ".join(f"{name} {value}" for name, value in cost.items() if value is not None)
    return "\n".join(lines) + (f"\n\n{told[0].upper()}{told[1:]}." if told else "")


def _score(row: Mapping[str, Any], name: str) -> str:
    value, error = row.get("scores", {}).get(name), row.get("stderr", {}).get(name)
    return "-" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _grids(folder: Path, run: Run, step: int) -> dict[str, str]:
    """Copies the base's and the policy's grid; what they show -> file name."""
    visits = [visit for visit in run.samples if visit.step <= step and visit.images]
    copied = {}
    for when, visit in {"before": visits[0], "after": visits[-1]}.items() if len(visits) > 1 else ():
        grid = visit.images[0].parent / "grid.png"
        if grid.is_file():
            copied[when] = f"{when}.png"
            shutil.copyfile(grid, folder / copied[when])
    return copied


def _use(generator: GeneratorConfig, to: str, files: Iterable[str], run: Run, step: int) -> str:
    """How to load it, and how to sample as in the run."""
    weights = [file for file in files if file.endswith(".safetensors")]
    listed = " and ".join(f"`{file}`" for file in weights)
    if to == "comfyui":
        return f"Put {listed} into `ComfyUI/models/loras` and load with *Load LoRA*."
    if to == "kohya":
        return f"{listed}: for programs that read a LoRA of sd-scripts or musubi-tuner."
    visit, stale = visit_of(run, step)
    place = None if to == "merged" else Weights(".", weights[1] if len(weights) > 1 else None)
    lines = code(run.config, place, shot(run, visit), bool(visit and visit.video))
    differs = [*stale, *differences(run.config, scheduler_of(generator.path, generator.kind))]
    what = f"the run's first sample of step {visit.step}" if visit else ""
    said = f"In this folder, this code generates {what} with plain diffusers" if visit else ""
    text = f"{said}{', but not the same image' if differs else ''}.\n\n" if said else ""
    reasons = "".join(f"- {one}\n" for one in differs) + ("\n" if differs else "")
    return f"{text}{reasons}```python\n{lines}\n```"


def _checked(found: Mapping[str, Any]) -> str:
    return (
        "Read back by diffusers and compared: velocities at three times differ from the trained policy's by at most "
        f"{found['difference']:.2g}, where they reach {found['velocity']:.2g} and the training changed them by up to "
        f"{found['effect']:.2g}."
    )
