"""Training of a judge on a table of preferences, as in ``alignflow reward train``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from align.config.load import dump_config
from align.data.files import new_folder, without_nan, write_json, write_text
from align.data.inputs import pixels_of
from align.data.media import to_tensor
from align.data.pair_table import Judged, read_judged
from align.data.prompts import PAIR
from align.maths.seeds import derive
from align.preference.bench import measure
from align.preference.formats import read_set
from align.preference.settings import JudgeTrainConfig
from align.runs.devices import require
from align.runs.lock import locked
from align.runs.owned import JUDGE, check_out, mark
from alignflow.errors import DataError, RunFolderError
from rewards.judges.asking import Question
from rewards.judges.loading import load_judge
from rewards.judges.local import LocalJudge
from rewards.judges.lora import add_lora, save_lora
from rewards.judges.settings import JudgeRewardSettings
from rewards.training.losses import first_token


@dataclass(frozen=True)
class Lesson:
    """A question and the correct reply, verdict first."""

    question: Question
    reply: str


def train_judge(
    config: JudgeTrainConfig, *, overwrite: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train a LoRA on the judge of a config into its folder; returns what ``summary.json`` holds.

    Raises:
        DataError, RewardError: tables, images, weights or LoRA targets that do not serve.
        RunFolderError: the folder is there already, or the loss is not finite.
    """
    check_out(config.run_dir, JUDGE, overwrite=overwrite)
    with locked(config.run_dir):
        check_out(config.run_dir, JUDGE, overwrite=overwrite)
        return _train(config, say)


def _train(config: JudgeTrainConfig, say: Callable[[str], None]) -> dict[str, Any]:
    rows = [row for row in read_judged(config.data.train, limit=config.data.limit) if row.outcome]
    if not rows:
        raise DataError(f"{config.data.train} holds only ties; training needs pairs with a preference")
    heldout = read_set("pairs", config.data.heldout) if config.data.heldout else []
    judge = load_judge(config.asking.judge, require(config.device, "device"))
    assert isinstance(judge, LocalJudge)
    reward = config.asking.around(judge)

    def accuracy() -> dict[str, Any] | None:
        return measure(reward, heldout, device=config.device).without_ties.model_dump() if heldout else None

    before, started = accuracy(), time.perf_counter()
    metrics = fit(config, judge, rows, say)
    summary = {
        "rows": len(rows),
        "heldout": len(heldout),
        "before": before,
        "after": accuracy(),
        "loss": metrics[-1]["loss"],
        "seconds": time.perf_counter() - started,
    }
    with new_folder(config.run_dir, replaces=True) as staging:
        mark(staging, JUDGE)
        save_lora(judge.model, staging)
        write_text(staging / "config.yaml", dump_config(config))
        write_text(staging / "metrics.jsonl", "".join(json.dumps(without_nan(row)) + "\n" for row in metrics))
        write_json(staging / "summary.json", summary)
    return summary


def fit(
    config: JudgeTrainConfig, judge: LocalJudge, rows: Sequence[Judged], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The loop, after which nothing of the judge is trained any more. Returns rows of metrics."""
    part, plan = config.lora, config.fit
    trained = add_lora(judge.model, part.rank, part.alpha, part.targets, derive(config.seed, "lora"))
    optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=plan.weight_decay)
    rng = np.random.default_rng(derive(config.seed, "rows"))
    metrics = []
    for step in range(1, plan.steps + 1):
        pick = rng.choice(len(rows), min(plan.batch, len(rows)), replace=False)
        lessons = [lesson for number in pick for lesson in lessons_of(config.asking, rows[number])]
        optimizer.zero_grad(set_to_none=True)
        found = learn(judge, lessons, config.verdict)
        if not np.isfinite(found["loss"]):
            raise RunFolderError(f"the loss is {found['loss']} at step {step}; nothing saved. Try a smaller fit.lr")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % plan.log_every == 0 or step in (1, plan.steps):
            metrics.append({"step": step, **found})
            say(f"step {step}/{plan.steps} loss {found['loss']:.4f}")
    judge.model.requires_grad_(False)
    return metrics


def lessons_of(settings: JudgeRewardSettings, row: Judged) -> list[Lesson]:
    """Questions about one pair with what should be said: the verdict, and behind it the row's reason if it has one.

    Raises:
        DataError: an image that is not there or cannot be read, a reason that is not text, two prompts.
    """
    reason = row.prompt.metadata.get("reason") or ""
    if not isinstance(reason, str):
        raise DataError(f'{row.prompt.where}: "reason" should be a text, given {reason!r:.40}')
    if row.rejected_text != row.prompt.text:
        raise DataError(f"{row.prompt.where}: a judge compares samples of one prompt, and rejected_prompt is another")
    chosen, rejected = (to_tensor(pixels_of(row.prompt, side)) for side in PAIR)
    lessons = []
    for question, number in settings.lessons(row.prompt.text, chosen, rejected):
        if question.refused:
            raise DataError(f"{row.prompt.where}: {question.refused}")
        lessons.append(Lesson(question, settings.answers[number][0] + (f"\n{reason}" if reason else "")))
    return lessons


def learn(judge: LocalJudge, lessons: Sequence[Lesson], verdict: float) -> dict[str, Any]:
    """Gradient of the mean loss of some lessons; the loss, and how probable the right verdicts were.

    Raises:
        DataError: a question with its reply is longer than the judge reads.
    """
    reasons: dict[int, str] = {}
    questions, replies = [one.question for one in lessons], [one.reply for one in lessons]
    loss, sure = 0.0, 0.0
    for _, logs, lengths in judge.reply_logs(questions, replies, reasons):
        part = first_token(logs, lengths, verdict).sum() / len(lessons)
        part.backward()
        loss += part.item()
        sure += logs[:, 0].exp().sum().item() / len(lessons)
    if reasons:
        raise DataError(next(iter(reasons.values())))
    return {"loss": loss, "verdict_probability": sure}
