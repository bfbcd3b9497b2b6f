"""Joint-GRPO: rewriter and generator trained in alternation under shared rewards, each with the other frozen."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.load import dump_config
from align.data.files import write_json, write_text
from align.data.prompts import read_prompts
from align.rewriting.table import lines, wanted_text
from align.rewriting.train import train_rewriter
from align.rewriting.words import instruction, rouge_l
from align.rewriting.writer import build_writer
from align.runs import devices
from align.runs.owned import JOINT
from align.runs.run_folder import RunFolder
from align.training.trainer import train
from alignflow.errors import DataError

if TYPE_CHECKING:
    from align.rewriting.joint_settings import JointConfig
    from align.rewriting.settings import RewriterConfig

ANCHORS = "anchors.jsonl"


def train_joint(
    config: JointConfig, *, resume: bool = False, overwrite: bool = False, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """All rounds of a config; returns the summaries of their stages, as ``summary.json`` holds them.

    Each stage is a run folder in ``stages/`` and starts from the LoRAs of the stages before it.

    Raises:
        AlignflowError: the message names the problem and the remedy.
        KeyboardInterrupt: after a step and its checkpoint, when the user stopped it.
    """
    run = RunFolder(config.run_dir, kind=JOINT)
    with run.held(dump_config(config), resume=resume, overwrite=overwrite):
        run.begin()
        found: list[dict[str, Any]] = []
        for turn in range(config.rounds):
            first, second = (config.run_dir / "stages" / f"{turn:02d}-{name}" for name in ("rewriter", "renderer"))
            before = config.run_dir / "stages" / f"{turn - 1:02d}-"
            say(f"round {turn + 1}/{config.rounds}: training the rewriter")
            words = _words(out=first)
            if turn:
                words += _words(**{"writer.lora": f"{before}rewriter", "generator_lora": f"{before}renderer"})
            rewriter = config.rewriter_config(words)
            found.append(_stage(first, partial(train_rewriter, rewriter, say=say)))
            anchors = config.run_dir / "stages" / f"{turn:02d}-{ANCHORS}"
            if not anchors.is_file():
                write_text(anchors, lines(anchored(rewriter, first, config.anchor)))
            say(f"round {turn + 1}/{config.rounds}: training the generator")
            renderer = config.renderer_config(_words(out=second, **{"prompts.train": anchors}))
            if turn:  # rank and layers come from the LoRA that is trained further
                policy = {"kind": "lora", "init": f"{before}renderer/lora"}
                renderer = renderer.model_copy(update={"policy": type(renderer.policy).model_validate(policy)})
            found.append(_stage(second, partial(train, renderer)))
        write_json(config.run_dir / "summary.json", found)
        return found


def _words(**settings: Any) -> list[str]:
    """Overrides."""
    return [f"{name}={json.dumps(str(value))}" for name, value in settings.items()]


def _stage(folder: Path, run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The summary of a stage, which is run to its end where it is not finished."""
    file = folder / "summary.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("status") != "finished":
        found = run(resume=folder.is_dir())
    return {"stage": folder.name, **found}


def anchored(config: RewriterConfig, lora: Path, least: float) -> list[dict[str, Any]]:
    """Rows of captions to train the generator on: the likeliest one of each prompt, without those far from the text.

    Args:
        lora: folder of the rewriter that was trained.
        least: ROUGE-L from which a caption is kept.

    Raises:
        DataError: none is left.
    """
    assert config.caption is not None
    prompts = read_prompts(config.prompts.train, config.prompts.limit, config.seed)
    settings = config.writer.model_copy(update={"lora": str(lora)})
    writer = build_writer(settings, devices.chosen(config.generator.device))
    reply = config.reply.model_copy(update={"temperature": 0.0})
    texts = writer.write([instruction(reply.template, prompt.text) for prompt in prompts], [0] * len(prompts), reply)
    wanted = [wanted_text(prompt, config.caption.column) for prompt in prompts]
    rows = [
        {"prompt": text, config.caption.column: aim, "user": prompt.text, "rouge_l": rouge_l(text, aim)}
        for prompt, text, aim in zip(prompts, texts, wanted, strict=True)
    ]
    kept = [row for row in rows if float(row["rouge_l"]) >= least and row["prompt"]]  # type: ignore[arg-type]
    if not kept:
        best = max(float(row["rouge_l"]) for row in rows)  # type: ignore[arg-type]
        raise DataError(
            f"no caption reaches a ROUGE-L of {least:g}, the best has {best:.3g}; train the rewriter longer"
        )
    return kept
