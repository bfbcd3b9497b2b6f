"""``alignflow prompts ...``: evolve prompts, and train a language model that rewrites them."""

from __future__ import annotations

import typer

from align.cli.shared import (
    ConfigArgument,
    Out,
    Overrides,
    Overwrite,
    Resume,
    cell,
    print_values,
    stoppable,
    with_out,
    within_reach,
)
from align.config.command_line import files_and_overrides
from alignflow.terminal import echo

app = typer.Typer(name="prompts", help="Rewrite prompts: evolve them, train a rewriter.", no_args_is_help=True)


@app.command(epilog="Example: alignflow prompts evolve configs/rewriting/evolve.yaml rounds=6")
def evolve(
    config: ConfigArgument, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False,
    out: Out = None,
) -> None:  # fmt: skip
    """Let a language model propose rewrites round by round; a frozen generator renders and a reward scores them."""
    from align.rewriting.settings import load_evolve

    files, overrides = files_and_overrides(config, overrides)
    settings = within_reach(load_evolve(files, with_out(overrides, out)))
    from align.rewriting.evolve import evolve as run

    with stoppable("prompts evolve", settings.run_dir, files, overrides, out):
        summary = run(settings, resume=resume, overwrite=overwrite, say=echo)
    scores = {name: f"{cell(ends['plain'])} -> {cell(ends['best'])}" for name, ends in summary["again"].items()}
    counts = {name: summary[name] for name in ("prompts", "rewrites", "missing")}
    print_values({**counts, **scores, "table": str(settings.run_dir / "rewrites.jsonl")})


@app.command(epilog="Example: alignflow prompts train configs/rewriting/grpo.yaml method.lr=1e-3")
def train(
    config: ConfigArgument, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False,
    out: Out = None,
) -> None:  # fmt: skip
    """Train a language model to rewrite prompts for a frozen generator: sft, dpo or grpo."""
    from align.rewriting.settings import load_rewriter

    files, overrides = files_and_overrides(config, overrides)
    settings = within_reach(load_rewriter(files, with_out(overrides, out)))
    from align.rewriting.train import train_rewriter as run

    with stoppable("prompts train", settings.run_dir, files, overrides, out):
        summary = run(settings, resume=resume, overwrite=overwrite, say=echo)
    ends = {name: summary[name] for name in ("plain", "before", "after") if summary[name]}
    for name in next(iter(ends.values()), {}):
        echo(f"held out {name}: " + ", ".join(f"{when} {cell(scores.get(name))}" for when, scores in ends.items()))
    echo(f'writer: {{model: "{getattr(settings.writer, "model", "")}", lora: "{settings.run_dir}"}}')


@app.command(epilog="Example: alignflow prompts joint configs/rewriting/joint.yaml rounds=2")
def joint(
    config: ConfigArgument, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False,
    out: Out = None,
) -> None:  # fmt: skip
    """Train a rewriter and the generator in alternation: one is frozen while the other learns."""
    from align.rewriting.joint_settings import load_joint

    files, overrides = files_and_overrides(config, overrides)
    settings = within_reach(load_joint(files, with_out(overrides, out)))
    from align.rewriting.joint import train_joint

    with stoppable("prompts joint", settings.run_dir, files, overrides, out):
        found = train_joint(settings, resume=resume, overwrite=overwrite, say=echo)
    for stage in found:
        ends = (
            stage.get("before") or {"gold": stage.get("gold_before")},
            stage.get("after") or {"gold": stage.get("gold_after")},
        )
        told = ", ".join(f"{name} {cell(value)} -> {cell(ends[1].get(name))}" for name, value in ends[0].items())
        echo(f"{stage['stage']}: {told}")
