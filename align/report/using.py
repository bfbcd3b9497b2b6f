"""Usage section of a report: diffusers code that reproduces the page's first sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from align.report.reading import Run, Samples
from align.report.usage import Shot, Weights, code, differences, scheduler_of

LORA, LORA_2 = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_transformer_2.safetensors"
NETWORKS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class Snippet:
    """Code, its output, and the reasons why that differs from the images on the page, if it does."""

    code: str
    draws: str
    differences: list[str] = field(default_factory=list)


def snippet(run: Run) -> Snippet | None:
    """The snippet of a run; None while nothing trained is on disk."""
    found = _newest(run)
    if found is None:
        return None
    folder, step = found
    visit, stale = visit_of(run, step)
    scheduler = scheduler_of(run.section("generator").get("path"), run.kind_of("generator"))
    draws = f"It generates the first sample of step {visit.step}" if visit else "It generates with the run's settings"
    lines = code(run.config, _weights(run, folder), shot(run, visit), bool(visit and visit.video))
    return Snippet(lines, draws, [*stale, *differences(run.config, scheduler)])


def _newest(run: Run) -> tuple[Path, int] | None:
    """The folder of the newest trained weights, and their step."""
    places = [(run.folder / "lora", run.steps), (run.folder, run.steps)] if run.summary else []
    for path in sorted(run.folder.glob("checkpoints/step-*"), reverse=True):
        digits = path.name.removeprefix("step-")
        places += [(path, int(digits))] if digits.isdigit() else []
    return next(
        ((path, step) for path, step in places if (path / LORA).is_file() or (path / NETWORKS[0]).is_dir()), None
    )


def visit_of(run: Run, step: int) -> tuple[Samples | None, list[str]]:
    """The samples of a step's weights, else the newest, and a sentence about the difference."""
    visits = [visit for visit in run.samples if visit.prompts]
    if not visits:
        return None, []
    found = next((visit for visit in visits if visit.step == step), None)
    if found is not None:
        return found, []
    return visits[-1], [f"The weights are those of step {step}, the newest samples those of step {visits[-1].step}."]


def _weights(run: Run, folder: Path) -> Weights:
    named = (run.folder.resolve().name / folder.relative_to(run.folder)).as_posix()
    networks = [name for name in NETWORKS if (folder / name).is_dir()] if not (folder / LORA).is_file() else []
    return Weights(named, LORA_2 if (folder / LORA_2).is_file() else None, networks)


def shot(run: Run, visit: Samples | None) -> Shot | None:
    """The first sample of a visit."""
    if visit is None:
        return None
    file = visit.video_file(0) or visit.images[0]
    root = run.folder.resolve().name
    source = f"{root}/{visit.sources[0].relative_to(run.folder).as_posix()}" if visit.sources else None
    return Shot(visit.prompts[0], visit.noise[0], f"{root}/{file.relative_to(run.folder).as_posix()}", source)
