"""The model card of an export: contents, measured results, and how to load it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from align.config.load import dump_yaml
from align.config.paths import named
from align.data.files import write_text
from align.export.licence import Licence, licence_of
from align.report.changes import Change, between, relation
from align.report.facts import facts
from align.report.reading import Run, Samples, read_run
from align.report.usage import Weights, code, differences, scheduler_of
from align.report.using import shot, visit_of

if TYPE_CHECKING:
    from align.config.model import GeneratorConfig
    from align.config.settings import Config
    from align.runs.trained import Trained

TRAINED = {"trained": " (trained on)", "part": " (a part of the trained reward)"}
PROMPTS = 4  # shown in the hub's gallery
TAGS = {
    "diffusers": ["template:diffusion-lora", "lora"],
    "comfyui": ["lora", "comfyui"],
    "kohya": ["lora"],
    "merged": [],
}


@dataclass(frozen=True)
class Images:
    """The samples that a card shows: their visit, and the files that were copied beside the card.

    Args:
        grids: what a grid shows -> its file.
        samples: file of each of the first samples.
        sources: file of each source image; empty where samples are made from none.
    """

    visit: Samples | None = None
    grids: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[str] = ()
    sources: Sequence[str] = ()


def write_card(folder: Path, config: Config, trained: Trained, to: str, found: Mapping[str, Any]) -> None:
    """Write ``README.md`` into an export, and beside it the grids of samples before and after, and the first samples.

    Folders of this machine are written as their last name.

    Args:
        found: what :func:`align.export.export` answers, without the card's own files.
    """
    run = read_run(trained.run)
    images = _copied(folder, run, trained.step)
    base = config.generator.path
    licence = licence_of(base, _shown(base))
    parts = [
        f"---\n{_header(config, run, to, licence, images)}\n---",
        f"# {config.name}",
        " ".join([_about(config, trained, to), *([licence.sentence] if licence else [])]),
        _numbers(run, trained.step),
        _training(config, run, trained.step),
        _gallery(images),
        "## Use\n\n" + _use(config.generator, to, list(found["files"]), run, trained.step, images),
        "## Checked\n\n" + _checked(found),
        "## Settings\n\n```yaml\n" + _settings(run) + "\n```",
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _shown(path: str) -> str:
    """A base model's name without the folders that hold it on this machine."""
    return Path(path).name if Path(path).expanduser().exists() else path


def _settings(run: Run) -> str:
    kept = {key: value for key, value in run.config.items() if key != "out"}
    return dump_yaml(named(kept, lambda path: Path(path).name)).strip()


def _header(config: Config, run: Run, to: str, licence: Licence | None, images: Images) -> str:
    """The YAML that the hub reads."""
    on_hub = config.generator.path.count("/") == 1 and not Path(config.generator.path).exists()
    video = bool(run.samples and run.samples[-1].video)
    editor = any(word in config.generator.kind for word in ("edit", "kontext", "fill", "i2v"))
    relation = "adapter" if to != "merged" else "finetune" if config.policy.kind == "full" else "merge"
    visit = images.visit or (run.samples[-1] if run.samples else None)
    widget: list[dict[str, Any]] = [{"text": prompt} for prompt in (visit.prompts[:PROMPTS] if visit else [])]
    for entry, file in zip(widget, images.samples, strict=False):
        entry["output"] = {"url": file}
    stated: dict[str, Any] = dict(licence.header) if licence else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=f"{'image' if editor else 'text'}-to-{'video' if video else 'image'}",
        tags=[*TAGS[to], "alignflow", "flow-matching", config.recipe.kind],
        base_model=config.generator.path if on_hub else None,
        base_model_relation=relation if on_hub else None,
        widget=widget or None,
        **stated,
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
        f"`{_shown(config.generator.path)}` aligned with alignflow: {what}{merged}, recipe `{config.recipe.kind}`, "
        f"{trained.step} training steps{rest}."
    )


def _numbers(run: Run, step: int) -> str:
    """Held-out scores before and after, with the 95 % interval of each change."""
    evals = [row for row in run.evals if row["step"] <= step]
    if not evals:
        return ""
    first, last = evals[0], evals[-1]
    before = first if first["step"] == 0 else {}
    lines = [
        f"## Held-out scores\n\n{last.get('prompts')} prompts, ± one standard error.\n",
        f"| score | base | step {last['step']} | change (95 % interval) |",
        "|---|---|---|---|",
    ]
    for name in last.get("scores", {}):
        shown = name + TRAINED.get(relation(run, name), "")
        change = between(run, name, 0, int(last["step"])) if before and first is not last else None
        lines.append(f"| {shown} | {_score(before, name)} | {_score(last, name)} | {_change(change)} |")
    return "\n".join(lines)


def _score(row: Mapping[str, Any], name: str) -> str:
    value, error = row.get("scores", {}).get(name), row.get("stderr", {}).get(name)
    return "-" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _change(change: Change | None) -> str:
    if change is None:
        return "-"
    delta = change.value(change.delta, signed=True)
    if change.interval is None:
        return delta
    low, high = (change.value(end, signed=True) for end in change.interval)
    return f"{delta} ({low} to {high})"


def _training(config: Config, run: Run, step: int) -> str:
    """The optimised reward, the recipe, and the costs."""
    reward = None if config.reward is None else _reward(config.reward.model_dump(mode="json"))
    rows = [("recipe", f"`{config.recipe.kind}`"), ("reward", reward), *facts(run)]
    whole = "" if run.steps in (0, step) else f"Costs are those of the whole run of {run.steps:,} steps.\n\n"
    lines = [f"| {name} | {value} |" for name, value in rows if value]
    return "\n".join([f"## Training\n\n{whole}| | |\n|---|---|", *lines])


def _reward(settings: Mapping[str, Any]) -> str:
    """The kind of a reward, and in brackets the kinds of the rewards that it holds."""
    kind = str(settings.get("kind"))
    place, colon, name = kind.rpartition(":")
    inner = [_reward(one) for one in _held(settings)]
    return f"`{Path(place).name}{colon}{name}`" + (f" ({', '.join(inner)})" if inner else "")


def _held(value: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rewards one level inside those of a reward."""
    for name, part in value.items():
        if isinstance(part, Mapping):
            if name == "reward" and "kind" in part:
                yield part
            else:
                yield from _held(part)


def _copied(folder: Path, run: Run, step: int) -> Images:
    """Copy the base's and the policy's grid, the first samples and the sources of all samples."""
    visits = [visit for visit in run.samples if visit.step <= step and visit.images]
    if len(visits) < 2:
        return Images()
    after, copied = visits[-1], {}
    for when, visit in {"before": visits[0], "after": after}.items():
        grid = visit.images[0].parent / "grid.png"
        if grid.is_file():
            copied[when] = f"{when}.png"
            shutil.copyfile(grid, folder / copied[when])
    files = [after.video_file(row) or image for row, image in enumerate(after.images[:PROMPTS])]
    return Images(after, copied, _beside(folder, files), _beside(folder, after.sources))


def _beside(folder: Path, files: Iterable[Path]) -> list[str]:
    """Copies of files in ``samples/``, by their names there; of those that are there."""
    names = []
    for file in files:
        if file.is_file():
            (folder / "samples").mkdir(exist_ok=True)
            shutil.copyfile(file, folder / "samples" / file.name)
            names.append(f"samples/{file.name}")
    return names


def _gallery(images: Images) -> str:
    """Both grids, and prompt and seed of each image in their order."""
    if images.visit is None or not images.grids:
        return ""
    visit = images.visit
    lines = ["## Images", "\n".join(f"![{when}]({name})" for when, name in images.grids.items())]
    rows = [
        f"| {row + 1} | {_cell(prompt)} | {seed} |"
        for row, (prompt, seed) in enumerate(zip(visit.prompts, visit.noise, strict=False))
    ]
    lines.append("\n".join(["| image | prompt | seed |", "|---|---|---|", *rows]))
    return "\n\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _use(generator: GeneratorConfig, to: str, files: Iterable[str], run: Run, step: int, images: Images) -> str:
    """How to load it, and how to sample as in the run."""
    weights = [file for file in files if file.endswith(".safetensors")]
    listed = " and ".join(f"`{file}`" for file in weights)
    if to == "comfyui":
        return f"Put {listed} into `ComfyUI/models/loras` and load with *Load LoRA*."
    if to == "kohya":
        return f"{listed}: for programs that read a LoRA of sd-scripts or musubi-tuner."
    visit, stale = visit_of(run, step)
    place = None if to == "merged" else Weights(".", weights[1] if len(weights) > 1 else None)
    first = shot(run, visit)
    shown = bool(images.grids) and visit is images.visit
    if first is not None and shown:
        source = images.sources[0] if images.sources else first.source
        first = replace(first, file="image 1", source=source)
    lines = code(run.config, place, first, bool(visit and visit.video))
    if (base := _shown(generator.path)) != generator.path:
        lines = lines.replace(json.dumps(generator.path, ensure_ascii=False), json.dumps(base, ensure_ascii=False))
    differs = [*stale, *differences(run.config, scheduler_of(generator.path, generator.kind))]
    what = f"the run's first sample of step {visit.step}" if visit else ""
    said = f"In this folder, this code generates {what} with plain diffusers" if visit else ""
    text = f"{said}{', but not the same image' if differs else ''}." if said else ""
    if shown and len(images.visit.prompts if images.visit else ()) > 1:
        text += "\nThe prompt and the seed of another image, from the table above, generate that image."
    reasons = "".join(f"- {one}\n" for one in differs) + ("\n" if differs else "")
    return (f"{text}\n\n" if text else "") + f"{reasons}```python\n{lines}\n```"


def _checked(found: Mapping[str, Any]) -> str:
    return (
        "Read back by diffusers and compared: velocities at three times differ from the trained policy's by at most "
        f"{found['difference']:.2g}, where they reach {found['velocity']:.2g} and the training changed them by up to "
        f"{found['effect']:.2g}."
    )
