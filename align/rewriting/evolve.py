"""Evolution of prompts: a language model proposes rewrites round by round, in view of earlier ones and their scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.load import dump_config
from align.data.files import write_json, write_text
from align.data.prompts import Prompt, read_prompts
from align.maths.seeds import derive
from align.preference.pair_store import needs_parquet, write_table
from align.rewriting.environment import Environment, Judged, Rewrite
from align.rewriting.table import compared, flat, lines, row_of
from align.rewriting.words import history, instruction
from align.rewriting.writer import Writer, build_writer
from align.runs.identity import data_digest, model_digest
from align.runs.owned import EVOLUTION
from align.runs.run_folder import RunFolder
from align.runs.stopping import GracefulStop
from alignflow.errors import DataError

if TYPE_CHECKING:
    from align.rewriting.settings import EvolveConfig

ROUNDS = "evolved"
"""Folder of what each batch of prompts gave, a file each, written whole."""


def evolve(
    config: EvolveConfig, *, resume: bool = False, overwrite: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Evolve every prompt of a config; returns what ``summary.json`` holds.

    Raises:
        AlignflowError: the message names the problem and the remedy.
        KeyboardInterrupt: after the prompts under way, when the user stopped it.
    """
    if config.parquet:
        needs_parquet()
    run = RunFolder(config.run_dir, kind=EVOLUTION)
    with run.held(dump_config(config), resume=resume, overwrite=overwrite):
        prompts = read_prompts(config.prompts.source, config.prompts.limit, config.seed)
        run.check_content(data=data_digest(prompts), model=model_digest(config.generator.path))
        judges = Environment.build(config)
        judges.check(prompts)
        writer = build_writer(config.writer, judges.generator.device)
        run.begin()
        return _evolve(config, judges, writer, prompts, say)


def _evolve(
    config: EvolveConfig, judges: Environment, writer: Writer, prompts: Sequence[Prompt], say: Callable[[str], None]
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    starts = range(0, len(prompts), config.batch)
    with GracefulStop(lambda _: say("stopping after the prompts in progress; interrupt again to stop at once")) as stop:
        for start in starts:
            file = config.run_dir / ROUNDS / f"{start:06d}.json"
            some = list(range(start, min(start + config.batch, len(prompts))))
            if (found := read_batch(file)) is None:
                found = evolve_batch(config, judges, writer, [prompts[number] for number in some], some)
                write_json(file, found)
            rows += found
            means = compared(rows)["reward"]
            say(f"{some[-1] + 1}/{len(prompts)} prompts  reward {means['plain']:.3f} -> {means['best']:.3f}")
            if stop.asked and start != starts[-1]:
                raise KeyboardInterrupt
    best = [{**row, "prompt": row["rewrite"], "user": row["prompt"]} for row in rows if row.get("best")]
    write_text(config.run_dir / "rewrites.jsonl", lines(rows))
    write_text(config.run_dir / "best.jsonl", lines(best))
    if config.parquet:
        write_table(config.run_dir / "rewrites.parquet", [flat(row) for row in rows])
    missing = sum(row["score"] is None for row in rows)
    if missing == len(rows):
        raise DataError(f"no rewrite of {len(prompts)} prompts has a score: {rows[0]['reason']}")
    summary = {"prompts": len(prompts), "rewrites": len(rows), "missing": missing, "again": compared(rows)}
    write_json(config.run_dir / "summary.json", summary)
    return summary


def evolve_batch(
    config: EvolveConfig, judges: Environment, writer: Writer, prompts: Sequence[Prompt], numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """All rounds of some prompts: a row per rewrite, the prompt itself first.

    The best rewrite and the plain prompt of each are scored once more on other noise, which chose neither.

    Args:
        numbers: of the prompts; all random numbers follow from them.
    """
    kept: dict[int, dict[str, tuple[int, Judged]]] = {number: {} for number in numbers}
    owners = dict(zip(numbers, prompts, strict=True))
    asked = [Rewrite(owners[number], number, owners[number].text) for number in numbers]
    for turn in range(config.rounds + 1):
        if turn:
            asked = _proposed(config, writer, owners, kept, turn)
        for one, judged in zip(asked, judges.judge(asked, ("evolve",)), strict=True):
            kept[one.number][one.text] = turn, judged
    best = {number: max(tried, key=lambda text: _known(tried[text][1].score)) for number, tried in kept.items()}
    pairs = [Rewrite(owners[n], n, text) for n in numbers for text in (owners[n].text, best[n])]
    again = judges.judge(pairs, ("measure",), gold=True)
    rows = []
    for place, number in enumerate(numbers):
        plain, better = again[2 * place : 2 * place + 2]
        for text, (turn, judged) in kept[number].items():
            row = row_of(owners[number], text, judged, round=turn, number=number)
            if text == best[number]:
                row |= {"best": True, "again": {"plain": plain.scores, "best": better.scores}}
            rows.append(row)
    return rows


def _proposed(
    config: EvolveConfig,
    writer: Writer,
    owners: dict[int, Prompt],
    kept: dict[int, dict[str, tuple[int, Judged]]],
    turn: int,
) -> list[Rewrite]:
    """Rewrites that were not tried before, of all prompts; the history is shown from worst to best."""
    asked, seeds, numbers = [], [], []
    for number, tried in kept.items():
        known = sorted((j.score, text) for text, (_, j) in tried.items() if math.isfinite(j.score))
        shown = history([(text, score) for score, text in known[-config.reply.shown :]])
        for k in range(config.proposals):
            asked.append(instruction(config.reply.template, owners[number].text, history=shown))
            seeds.append(derive(config.seed, "propose", turn, number, k))
            numbers.append(number)
    replies = writer.write(asked, seeds, config.reply)
    new = dict.fromkeys((number, text) for number, text in zip(numbers, replies, strict=True) if text)
    return [Rewrite(owners[number], number, text) for number, text in new if text not in kept[number]]


def _known(score: float) -> float:
    return score if math.isfinite(score) else -math.inf


def read_batch(file: Path) -> list[dict[str, Any]] | None:
    """Rows of a batch; None if they are not there or damaged, and the batch is evolved again."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return rows if isinstance(rows, list) and all(isinstance(row, dict) and "rewrite" in row for row in rows) else None
